"""All or nothing: a model is bit for bit as before when something fails in the middle of a change to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from typing import Any

from torch import nn

from mmpeft.host import CHILD
from mmpeft.parts.statistics import own_modules
from mmpeft.state import STATE, State

TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, `KeyboardInterrupt` included, leaves the model as it was before, and goes on.

    Put back are the base modules' classes, attributes, modes and tables (so which tensor stands where, and which parts
    hang where), `requires_grad` of every tensor, and the state of all tunings with the route in use. Values are not
    copied: inside, the tensors that were there before may be exchanged and must not be written to.
    """
    modules = [_Kept(module) for _, module in own_modules(model)]
    flags = [(tensor, tensor.requires_grad) for tensor in model.parameters()]
    state: State | None = model.__dict__.get(STATE)
    values = {} if state is None else {f.name: _shallow(getattr(state, f.name)) for f in fields(state)}
    try:
        yield
    except BaseException:
        for kept in modules:
            kept.put_back()
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
        if state is not None:
            vars(state).update(values)
        raise


class _Kept:
    """What one module was: its class, its attributes, its tables, and the parts of each tuning that hang under it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.own = dict(module.__dict__)
        self.tables = {name: dict(getattr(module, name)) for name in TABLES}
        child = module._modules.get(CHILD)
        under = [] if child is None else [child, *child._modules.values()]
        self.under = [(held, dict(held._modules)) for held in under if held is not None]

    def put_back(self) -> None:
        own = self.module.__dict__
        for name in own.keys() - self.own.keys():
            del own[name]
        own.update(self.own)
        for name, held in self.tables.items():
            _refill(own[name], held)
        for child, parts in self.under:
            _refill(child._modules, parts)
        self.module.__class__ = self.cls  # last: its attributes are there by now


def _refill(table: dict[str, Any], held: dict[str, Any]) -> None:
    table.clear()
    table.update(held)


def _shallow(value: Any) -> Any:
    return copy(value) if isinstance(value, dict | list) else value
