"""All or nothing: a model is bit for bit as before when something fails in the middle of a change to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import fields

import torch
from torch import nn

from mmpeft.hosting.modules import CHILD, own_modules
from mmpeft.hosting.running import CHOICES
from mmpeft.surgery.state import STATE, State

TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def unchanged_on_error(model: nn.Module, parts: bool = False) -> Iterator[None]:
    """Whatever is raised inside, `KeyboardInterrupt` included, leaves the model as it was before, and goes on.

    Put back are the base modules' classes, attributes, modes and tables (so which tensor stands where, and which parts
    hang where), `requires_grad` of its tensors, and the state of all tunings with the route in use. Values are not
    copied: tensors that were there before may be exchanged inside and must not be written to. What trains of the parts
    that were there is put back with `parts` only: a model may have many, and few changes touch them.
    """
    modules = [_Kept(module) for _, module in own_modules(model)]
    base = (p for kept in modules for p in kept.module._parameters.values() if p is not None)
    flags = [(tensor, tensor.requires_grad) for tensor in (model.parameters() if parts else base)]
    states = [_KeptState(kept.own[STATE]) for kept in modules if STATE in kept.own]
    choices, grad = CHOICES.get(), torch.is_grad_enabled()
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(grad)  # an interrupt may come while `no_grad` ends, inside a mode that watches it
        with ExitStack() as alone:
            for state in states:
                alone.enter_context(state.state.gate.alone(state.state))
            for kept in modules:
                kept.put_back()
            for tensor, flag in flags:
                tensor.requires_grad_(flag)
            CHOICES.set(choices)
            for state in states:
                state.put_back()
        raise


class _KeptState:
    """What the tunings of one model were, and what every thread, task and generator had chosen among them."""

    def __init__(self, state: State) -> None:
        self.state, self.default = state, state.default
        self.values = {f.name: _shallow(getattr(state, f.name)) for f in fields(state)}
        self.routes = [(choice, choice.route) for choice in list(state.live)]

    def put_back(self) -> None:
        vars(self.state).update(self.values)
        self.state.default = self.default
        for choice, route in self.routes:
            choice.route = route
        self.state.replan()


class _Kept:
    """What one module was: its class, its attributes, its tables, and which tunings have parts under it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.own = dict(module.__dict__)
        tables = [self.own[name] for name in TABLES]
        under = module._modules.get(CHILD)
        tables += [] if under is None else [under._modules]
        self.tables = [(table, dict(table)) for table in tables]

    def put_back(self) -> None:
        own = self.module.__dict__
        for name in own.keys() - self.own.keys():
            del own[name]
        own.update(self.own)
        for table, held in self.tables:
            table.clear()
            table.update(held)
        self.module.__class__ = self.cls  # last: what the class reads is there by now


def _shallow(value: object) -> object:
    return copy(value) if isinstance(value, dict | list) else value
