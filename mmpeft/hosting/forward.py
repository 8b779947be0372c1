"""The forward pass of a host: what its plan says, around the module's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.hosting.modules import SEAT
from mmpeft.hosting.offload import looked, take_back
from mmpeft.hosting.output import first_of, with_first
from mmpeft.hosting.patched import is_inside
from mmpeft.hosting.quantized import Product, packs
from mmpeft.hosting.running import RUNNING, Pinned, Planned, current, remember
from mmpeft.types import AnyModule, Args, Argument, Attribute, Forward, Kwargs, Output, StateDict

if TYPE_CHECKING:
    from mmpeft.parts.base import Call, Part
    from mmpeft.surgery.state import State


@dataclass
class HostPlan:
    """What a host does in its forward pass under a route; empty lists are the plain backbone."""

    enter: tuple[Part, ...] = ()
    exit: tuple[Part, ...] = ()
    call: Call | None = None
    reads: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    answer: Callable[[nn.Module, str, Attribute, tuple[Part, ...]], Attribute] | None = None
    """What code finds that reads an attribute of the host, by its name and its value, under the parts of `reads`."""
    wraps: tuple[Part, ...] = ()
    """Parts that run the host themselves, the first one outermost."""
    around: Forward | None = None
    """Runs the host inside `wraps`: recomputation, which repeats it and those of `wraps` that are `repeated`."""
    alone: bool = False
    """Whether `call` is all there is: the common case of a tuned linear, kept free of further tests."""


PLAIN = HostPlan()


class Seat:
    """A host's place in its model: the model's state, its own number there, and its plans by the number of a route."""

    def __init__(self, state: State, index: int, path: str) -> None:
        self.state, self.index, self.path = state, index, path
        self.plans: dict[int, HostPlan] = {}

    def __getstate__(self) -> StateDict:
        return {"state": self.state, "index": self.index, "path": self.path}

    def __setstate__(self, values: StateDict) -> None:
        self.__dict__.update(values, plans={})


def forward_of(base: AnyModule, instead: Forward | None = None) -> Forward:
    """The forward of a host of class `base`, or what runs `instead`, under the signature, name and doc of its own."""
    own: Forward = instead or (Product.forward if packs(base) else base.forward)
    function = isinstance(base.forward, FunctionType)

    def inner(self: AnyModule, *args: Argument, **kwargs: Argument) -> Output:
        if "forward" in self.__dict__:
            return self.__dict__["forward"].run(*args, **kwargs)
        return own(self, *args, **kwargs) if function else base.forward(*args, **kwargs)

    def forward(self: AnyModule, *args: Argument, **kwargs: Argument) -> Output:
        seat = getattr(self, SEAT, None)
        if seat is None:  # a bound method that outlived the tuning
            return own(self, *args, **kwargs)
        if "forward" in self.__dict__ and is_inside(self):
            return own(self, *args, **kwargs)
        running = RUNNING.get()
        if running is None or running.state is not seat.state:
            return _pass(self, seat, inner, args, kwargs)
        if torch.compiler.is_compiling() and running.number is not None:
            plan = seat.plans.get(running.number)
        else:
            plan = running.plans.get(seat.index)
        if plan is None:
            return inner(self, *args, **kwargs)
        if plan.alone and not kwargs and len(args) == 1:
            return plan.call(self, args[0])
        return run(self, plan, inner, args, kwargs)

    if not function:
        return forward
    found = wraps(base.forward)(forward)
    found.__dict__["__signature__"] = inspect.signature(base.forward)  # where inspect looks for it
    return found


def _pass(host: AnyModule, seat: Seat, inner: Forward, args: Args, kwargs: Kwargs) -> Output:
    """A host that is run from outside: a pass through the model, or through a part of it, begins here."""
    planned = current(seat.state)
    if torch.compiler.is_compiling() and (planned.rows is None or (seat.state.proofs and not planned.whole)):
        plan = planned.plans.get(seat.index)
        return inner(host, *args, **kwargs) if plan is None else run(host, plan, inner, args, kwargs)
    return _begun(host, seat, planned, inner, args, kwargs)


def _begun(host: AnyModule, seat: Seat, planned: Planned, inner: Forward, args: Args, kwargs: Kwargs) -> Output:
    state = seat.state
    plan = planned.plans.get(seat.index, PLAIN)
    if planned.whole and seat.path and seat.index in planned.plans:
        raise ConfigError(
            f"the rows in use() need passes of their own through the whole model, but {seat.path} was run by itself "
            "(generate() runs an encoder so, encode_image() a tower): call the model, or use() one name at a time"
        )
    if not looked(state):
        take_back(state)
    this, token = object(), None
    try:
        state.gate.enter(this)
        token = RUNNING.set(planned)
        if planned.rows is not None and not seat.path:
            output = planned.rows(planned, partial(_under, host, seat, inner), args, kwargs)
        else:
            output = run(host, plan, inner, args, kwargs)
    finally:
        if token is not None:
            RUNNING.reset(token)
        state.gate.leave(this)
    if torch.is_grad_enabled():
        remember(output, planned)
    return output


def _under(host: AnyModule, seat: Seat, inner: Forward, planned: Planned, args: Args, kwargs: Kwargs) -> Output:
    """One of several passes through the whole model."""
    token = RUNNING.set(planned)
    try:
        output = run(host, planned.plans.get(seat.index, PLAIN), inner, args, kwargs)
    finally:
        RUNNING.reset(token)
    if torch.is_grad_enabled():
        remember(output, planned)
    return output


def run(host: AnyModule, plan: HostPlan, inner: Forward, args: Args, kwargs: Kwargs) -> Output:
    """A host's forward pass with the parts of a plan."""
    if not plan.wraps and plan.around is None:
        return _with_parts(host, plan, inner, *args, **kwargs)
    call = _wrapped(host, plan, partial(_with_parts, host, plan, inner), repeated=True)
    if plan.around is not None:
        call = partial(plan.around, call if torch.compiler.is_compiling() else Pinned(call))
    return _wrapped(host, plan, call, repeated=False)(*args, **kwargs)


def _wrapped(host: AnyModule, plan: HostPlan, call: Forward, repeated: bool) -> Forward:
    for part in reversed(plan.wraps):
        if part.repeated == repeated:
            call = partial(part.around, host, call)
    return call


def _with_parts(host: AnyModule, plan: HostPlan, inner: Forward, *args: Argument, **kwargs: Argument) -> Output:
    if not (plan.enter or plan.exit or plan.call):
        return inner(host, *args, **kwargs)
    if not (args or kwargs):
        return inner(host)
    name = "" if args else _input_name(type(host), kwargs)
    x, args = (kwargs.pop(name), args) if name else (args[0], args[1:])
    for part in plan.enter:
        x = part.enter(host, x)
    if plan.call and not (args or kwargs) and name in ("", "input", "x"):
        y = plan.call(host, x)
    else:  # by its own name, as the module was called: one that it does not know is its own error
        y = inner(host, *args, **{name: x}, **kwargs) if name else inner(host, x, *args, **kwargs)
    for part in plan.exit:
        y = with_first(y, part.exit(host, x, first_of(y)))
    return y


def _input_name(cls: AnyModule, kwargs: Kwargs) -> str:
    """The name of what a module reads, where all arguments are named: its first parameter, or the first given."""
    own = _first_parameter(cls)
    return own if own in kwargs else next(iter(kwargs))


@cache
def _first_parameter(cls: AnyModule) -> str:
    return next(iter(list(inspect.signature(cls.forward).parameters)[1:]), "")


def planned_of(host: nn.Module) -> Planned:
    """What runs in a host's model at present: in the pass that runs, or under this context's choice."""
    seat: Seat = getattr(host, SEAT)
    running = RUNNING.get()
    return current(seat.state) if running is None or running.state is not seat.state else running


def plan_of(host: nn.Module) -> HostPlan:
    """What a host does at present."""
    seat: Seat = getattr(host, SEAT)
    planned = planned_of(host)
    if torch.compiler.is_compiling() and RUNNING.get() is planned and planned.number is not None:
        return seat.plans.get(planned.number, PLAIN)
    return planned.plans.get(seat.index, PLAIN)
