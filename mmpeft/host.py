"""A module that hosts parts: the class swap, and the forward pass around the parts.

Follows PyTorch's own `fully_shard` and `parametrize`: the module keeps its object, its type (a cached subclass of the
same name, so `isinstance` still holds), its forward's signature and every state-dict key; the parts hang under it as
one child named `mmpeft`. Only `mmpeft.surgery` performs it.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.few_bits import Product, packs, viewed
from mmpeft.modules import CHILD as CHILD
from mmpeft.modules import module_at as module_at
from mmpeft.offload import HOOK, Hooked, fetched, looked, take_back
from mmpeft.running import RUNNING, Pinned, Planned, current, remember
from mmpeft.still import MODE, Still

if TYPE_CHECKING:
    from mmpeft.parts.base import Call, Part
    from mmpeft.state import State

SEAT = "_mmpeft_seat"
HOSTED = "_mmpeft_hosted"
"""Marks the forward of a swapped class."""
PATCHED = "_mmpeft_patched"
"""Where a host keeps a forward that somebody had put on the module itself before it became one."""


@dataclass
class Plan:
    """What a host does in its forward pass under a route; empty lists are the plain backbone."""

    enter: tuple[Part, ...] = ()
    exit: tuple[Part, ...] = ()
    call: Call | None = None
    reads: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    wraps: tuple[Part, ...] = ()
    """Parts that run the host themselves, the first one outermost."""
    around: Callable[..., Any] | None = None
    """Runs the host inside `wraps`: recomputation, which repeats it and those of `wraps` that are `repeated`."""
    alone: bool = False
    """Whether `call` is all there is: the common case of a tuned linear, kept free of further tests."""


PLAIN = Plan()


class Seat:
    """A host's place in its model: the model's state, its own number there, and its plans by the number of a route."""

    def __init__(self, state: State, index: int, path: str) -> None:
        self.state, self.index, self.path = state, index, path
        self.plans: dict[int, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state, "index": self.index, "path": self.path}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values, plans={})


class TunedMeta(type):
    """Metaclass of the swapped classes; picklable through the recipe that made them."""

    base: type
    reads: frozenset[str]
    packed: bool
    """Whether the module multiplies by its weight in a way of bitsandbytes' own."""

    def __str__(cls) -> str:
        """The backbone's own: transformers keeps by it which outputs a class can record."""
        return str(cls.base)


def tuned_part(cls: type) -> TunedMeta | None:
    """The swapped class in a class's hierarchy: itself, or one that other libraries have derived from; None without."""
    return next((c for c in cls.__mro__ if isinstance(c, TunedMeta) and "base" in vars(c)), None)


def _reduced(cls: TunedMeta) -> Any:
    if "base" not in vars(cls):  # of another library, on top of a swapped one
        return cls.__qualname__
    return tuned_class, (cls.base, cls.reads)


copyreg.pickle(TunedMeta, _reduced)  # type: ignore[arg-type]


def _forward(base: Any, still: bool) -> Callable[..., Any]:
    """The forward of a host of class `base`, under the signature, name and doc of its own."""
    own: Any = Still.forward if still else Product.forward if packs(base) else base.forward

    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._mmpeft_patched is not None:
            return self._mmpeft_patched(*args, **kwargs)
        return own(self, *args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat = getattr(self, SEAT, None)
        if seat is None:  # a bound method that outlived the tuning
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
        if plan.alone and not kwargs:
            return plan.call(self, *args)
        return run(self, plan, inner, args, kwargs)

    if not isinstance(base.forward, FunctionType):
        forward.__dict__[HOSTED] = True
        return forward
    found = wraps(base.forward)(forward)
    found.__dict__[HOSTED] = True
    found.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return found


def _pass(host: Any, seat: Seat, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A host that is run from outside: a pass through the model, or through a part of it, begins here."""
    planned = current(seat.state)
    if torch.compiler.is_compiling() and (planned.rows is None or (seat.state.proofs and not planned.whole)):
        plan = planned.plans.get(seat.index)
        return inner(host, *args, **kwargs) if plan is None else run(host, plan, inner, args, kwargs)
    return _begun(host, seat, planned, inner, args, kwargs)


def _begun(host: Any, seat: Seat, planned: Planned, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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


def _under(host: Any, seat: Seat, inner: Callable[..., Any], planned: Planned, args: Any, kwargs: Any) -> Any:
    """One of several passes through the whole model."""
    token = RUNNING.set(planned)
    try:
        output = run(host, planned.plans.get(seat.index, PLAIN), inner, args, kwargs)
    finally:
        RUNNING.reset(token)
    if torch.is_grad_enabled():
        remember(output, planned)
    return output


def run(host: Any, plan: Plan, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A host's forward pass with the parts of a plan."""
    if not plan.wraps and plan.around is None:
        return _inside(host, plan, inner, *args, **kwargs)
    call = _wrapped(host, plan, partial(_inside, host, plan, inner), repeated=True)
    if plan.around is not None:
        call = partial(plan.around, call if torch.compiler.is_compiling() else Pinned(call))
    return _wrapped(host, plan, call, repeated=False)(*args, **kwargs)


def _wrapped(host: Any, plan: Plan, call: Callable[..., Any], repeated: bool) -> Callable[..., Any]:
    for part in reversed(plan.wraps):
        if part.repeated == repeated:
            call = partial(part.around, host, call)
    return call


def _inside(host: Any, plan: Plan, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (plan.enter or plan.exit or plan.call):
        return inner(host, *args, **kwargs)
    if args:
        x, args = args[0], args[1:]
    else:
        name = next(iter(kwargs))
        x = kwargs.pop(name)
    for part in plan.enter:
        x = part.enter(host, x)
    y = plan.call(host, x) if plan.call else inner(host, x, *args, **kwargs)
    for part in plan.exit:
        first, *rest = y if isinstance(y, tuple) else (y,)
        first = part.exit(host, x, first)
        y = (first, *rest) if isinstance(y, tuple) else first
    return y


def plan_of(host: nn.Module) -> Plan:
    """What a host does at present: in the pass that runs, or under this context's choice."""
    seat: Seat = getattr(host, SEAT)
    running = RUNNING.get()
    if running is None or running.state is not seat.state:
        running = current(seat.state)
    elif torch.compiler.is_compiling() and running.number is not None:
        return seat.plans.get(running.number, PLAIN)
    return running.plans.get(seat.index, PLAIN)


def base_value(module: nn.Module, name: str) -> Any:
    """The backbone's own value of an attribute, whatever parts read it; a packed weight in its true shape.

    What accelerate holds elsewhere between passes is read from there.
    """
    for store in (module._parameters, module._buffers, module.__dict__):
        if name in store:
            return fetched(module, name, viewed(module, store[name]))
    own = getattr(original_class(module), name, None)
    if isinstance(own, property):  # of a parametrised module, which computes its weight
        return own.fget(module)  # type: ignore[misc]
    raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")


def _reader(name: str) -> property:
    def read(self: Any) -> Any:
        value = base_value(self, name)
        for part in plan_of(self).reads.get(name, ()):
            value = part.read(self, name, value)
        return value

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(read, write)


@cache
def tuned_class(base: type, reads: frozenset[str]) -> TunedMeta:
    """The subclass of `base` that hosts parts and lets them answer for the attributes `reads`."""
    still = MODE in reads
    namespace: dict[str, Any] = {name: _reader(name) for name in reads - {MODE}}
    namespace |= {"base": base, "reads": reads, "packed": packs(base), "forward": _forward(base, still)}
    namespace |= {"__module__": base.__module__, "__doc__": base.__doc__, "__qualname__": base.__qualname__}
    namespace |= {PATCHED: None, HOOK: Hooked(), "__prepare_scriptable__": _scriptable}
    return _meta(type(base))(base.__name__, (Still, base) if still else (base,), namespace)


@cache
def _meta(kind: type) -> type[TunedMeta]:
    """The metaclass for a base whose own metaclass is `kind` (abstract classes have one)."""
    if issubclass(TunedMeta, kind):
        return TunedMeta
    found = type(TunedMeta.__name__, (TunedMeta, kind), {"__module__": TunedMeta.__module__})
    copyreg.pickle(found, _reduced)  # type: ignore[arg-type]
    return found


def _scriptable(host: nn.Module) -> nn.Module:
    """What `torch.jit.script` compiles: the plain model, once all that is tuned is merged into it."""
    seat: Seat = getattr(host, SEAT)
    if seat.path or set(seat.state.placements) - set(seat.state.merged):
        raise Refused(
            "TorchScript knows no tunings: merge() them and script the whole model, or use torch.jit.trace, "
            "torch.export or torch.compile, which take them as they are"
        )
    return plain_copy(host)


def plain_copy(module: nn.Module) -> nn.Module:
    """A model of the same modules' own classes that shares every tensor of the backbone, and hosts nothing."""
    made: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            tuned = tuned_part(type(module))
            cls: Any = type(module) if tuned is None else rebased(type(module), tuned, tuned.base)
            made[id(module)] = new = cls.__new__(cls)
            own = {k: v for k, v in module.__dict__.items() if not k.startswith("_mmpeft")}
            if PATCHED in module.__dict__:
                own["forward"] = module.__dict__[PATCHED]
            new.__dict__.update(own)
            for table in ("_parameters", "_buffers"):
                new.__dict__[table] = dict(module.__dict__[table])
            children = {k: v for k, v in module._modules.items() if tuned is None or k != CHILD}
            new.__dict__["_modules"] = {k: v if v is None else copied(v) for k, v in children.items()}
        return made[id(module)]

    return copied(module)


def rebased(cls: type, old: type, new: type) -> type:
    """`cls` with `new` in the place of `old` among its bases: what other libraries derived from it is kept."""
    if cls is old:
        return new
    if not issubclass(cls, old):
        return cls
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    found: type = type(new)(cls.__name__, tuple(rebased(base, old, new) for base in cls.__bases__), own)
    return found


def original_class(module: nn.Module) -> type:
    """A module's class as its library wrote it."""
    tuned = tuned_part(type(module))
    return type(module) if tuned is None else tuned.base


def is_host(module: nn.Module) -> bool:
    """Whether a module's class has been swapped."""
    return SEAT in module.__dict__


def make_host(module: nn.Module, seat: Seat, reads: frozenset[str]) -> None:
    """Swap a module's class, or widen the attributes that parts may answer for."""
    cls: type = type(module)
    tuned = tuned_part(cls)
    if tuned is not None:
        if not reads <= tuned.reads:
            module.__class__ = rebased(cls, tuned, tuned_class(tuned.base, reads | tuned.reads))
        return
    if isinstance(module, torch.jit.ScriptModule):
        raise Refused(f"{cls.__name__} is a TorchScript module; attach before scripting")
    module.__dict__[SEAT] = seat
    made = tuned_class(cls, reads)
    if "forward" in module.__dict__ and not _inside_hook(module, made):
        module.__dict__[PATCHED] = module.__dict__.pop("forward")
    module.__class__ = made  # type: ignore[assignment]


def _inside_hook(module: nn.Module, cls: type) -> bool:
    """Have accelerate's hook, which moves tensors around a module's own forward, run that of `cls`; False without."""
    inside = module.__dict__.get("_old_forward")
    if HOOK not in module.__dict__ or not isinstance(inside, MethodType) or inside.__self__ is not module:
        return False
    module.__dict__["_old_forward"] = MethodType(cls.forward, module)  # type: ignore[attr-defined]
    return True


def unmake_host(module: nn.Module) -> None:
    """Give a module its original class back."""
    tuned = tuned_part(type(module))
    assert tuned is not None
    base = rebased(type(module), tuned, tuned.base)
    _inside_hook(module, base)
    module.__class__ = base
    if PATCHED in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(PATCHED)
    del module.__dict__[SEAT]
    module._modules.pop(CHILD, None)


def is_patched(module: nn.Module) -> bool:
    """Whether somebody has put a forward of their own on a module, which parts must run and not replace.

    One that accelerate has put there runs the module's own inside.
    """
    own = module.__dict__
    if PATCHED in own or "forward" not in own:
        return PATCHED in own
    left = isinstance(own["forward"], MethodType) and hasattr(own["forward"].__func__, HOSTED)
    return HOOK not in own and not left  # what a hook that was taken off has left behind is the host's own forward
