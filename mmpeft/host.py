"""A module that hosts parts: the class swap, and the forward pass around the parts.

Follows PyTorch's own `fully_shard` and `parametrize`: the module keeps its object, its type (a cached subclass of the
same name, so `isinstance` still holds), its forward's signature and every state-dict key; the parts hang under it as
one child named `mmpeft`. Only `mmpeft.surgery` performs it.
"""

from __future__ import annotations

import copyreg
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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


class Patched:
    """`forward` of a host on which somebody has put one of their own, which runs inside the parts.

    Each sees the one before it as the module had it; what calls the class's own forward gets the base's.
    """

    def __init__(self, host: nn.Module, patch: Callable[..., Any]) -> None:
        self.host, self.patch = host, patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        host: Any = self.host
        if not is_host(host) or any(inside is host for inside in getattr(_inside, "patches", ())):
            return self.run(*args, **kwargs)
        return type(host).forward(host, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The patch itself."""
        patches = _inside.__dict__.setdefault("patches", [])
        patches.append(self.host)
        try:
            return self.patch(*args, **kwargs)
        finally:
            patches.pop()

    def __getattr__(self, name: str) -> Any:
        """What the patch has: its function, which others wrap to make the next one, or what it wraps itself."""
        if "patch" not in self.__dict__:  # being copied
            raise AttributeError(name)
        return getattr(self.patch, name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.patch)


_inside = threading.local()
"""The hosts whose patched forward this thread is in."""


def _setattr(self: Any, name: str, value: Any) -> None:
    if name == "forward" and SEAT in self.__dict__:
        state = self.__dict__[SEAT].state
        with state.gate.alone(state):
            _patch(self, value)
            state.forget()  # whoever patches one module may go on with others: plans wait for the next pass
    else:
        nn.Module.__setattr__(self, name, value)


def _patch(host: nn.Module, patch: Any) -> None:
    """Put a forward on a host, or take it off again."""
    own: Any = original_class(host)
    if isinstance(patch, Patched) and patch.host is host:
        host.__dict__["forward"] = patch
    elif getattr(patch, "__self__", None) is host and patch.__func__ in (type(host).forward, own.forward):
        host.__dict__.pop("forward", None)
    else:
        host.__dict__["forward"] = Patched(host, patch)
        make_host(host, host.__dict__[SEAT], frozenset({"weight"} & host._parameters.keys()))


def _forward(base: Any, still: bool) -> Callable[..., Any]:
    """The forward of a host of class `base`, under the signature, name and doc of its own."""
    own: Any = Still.forward if still else Product.forward if packs(base) else base.forward
    function = isinstance(base.forward, FunctionType)

    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.__dict__:
            return self.__dict__["forward"].run(*args, **kwargs)
        return own(self, *args, **kwargs) if function else base.forward(*args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat = getattr(self, SEAT, None)
        if seat is None:  # a bound method that outlived the tuning
            return own(self, *args, **kwargs)
        if "forward" in self.__dict__ and any(inside is self for inside in getattr(_inside, "patches", ())):
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
    state.gate.enter()
    token = RUNNING.set(planned)
    try:
        if planned.rows is not None and not seat.path:
            output = planned.rows(planned, partial(_under, host, seat, inner), args, kwargs)
        else:
            output = run(host, plan, inner, args, kwargs)
    finally:
        RUNNING.reset(token)
        state.gate.leave()
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
        return _with_parts(host, plan, inner, *args, **kwargs)
    call = _wrapped(host, plan, partial(_with_parts, host, plan, inner), repeated=True)
    if plan.around is not None:
        call = partial(plan.around, call if torch.compiler.is_compiling() else Pinned(call))
    return _wrapped(host, plan, call, repeated=False)(*args, **kwargs)


def _wrapped(host: Any, plan: Plan, call: Callable[..., Any], repeated: bool) -> Callable[..., Any]:
    for part in reversed(plan.wraps):
        if part.repeated == repeated:
            call = partial(part.around, host, call)
    return call


def _with_parts(host: Any, plan: Plan, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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
        first, *rest = y if isinstance(y, tuple) else (y,)
        first = part.exit(host, x, first)
        y = (first, *rest) if isinstance(y, tuple) else first
    return y


def _input_name(cls: Any, kwargs: dict[str, Any]) -> str:
    """The name of what a module reads, where all arguments are named: its first parameter, or the first given."""
    own = _first_parameter(cls)
    return own if own in kwargs else next(iter(kwargs))


@cache
def _first_parameter(cls: Any) -> str:
    return next(iter(list(inspect.signature(cls.forward).parameters)[1:]), "")


def planned_of(host: nn.Module) -> Planned:
    """What runs in a host's model at present: in the pass that runs, or under this context's choice."""
    seat: Seat = getattr(host, SEAT)
    running = RUNNING.get()
    return current(seat.state) if running is None or running.state is not seat.state else running


def plan_of(host: nn.Module) -> Plan:
    """What a host does at present."""
    planned, seat = planned_of(host), getattr(host, SEAT)
    if torch.compiler.is_compiling() and RUNNING.get() is planned and planned.number is not None:
        return seat.plans.get(planned.number, PLAIN)  # type: ignore[no-any-return]
    return planned.plans.get(seat.index, PLAIN)


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


def is_sharded(value: Any) -> bool:
    """Whether a tensor is one process's share of a distributed one."""
    return type(value) not in (Tensor, nn.Parameter) and type(value).__name__ == "DTensor"


def _reader(name: str) -> property:
    from mmpeft.parts.tuned import answered  # parts import this module

    def read(self: Any) -> Any:
        value = base_value(self, name)
        if is_sharded(value):  # asked for by who shards it: forward passes find it whole
            return value
        parts = plan_of(self).reads.get(name)
        return answered(self, name, value, parts) if parts else value

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
    namespace |= {"__setattr__": _setattr, HOOK: Hooked(), "__prepare_scriptable__": _scriptable}
    return _meta(type(base))(base.__name__, (Hosting, *((Still,) if still else ()), base), namespace)


class Hosting:
    """Mixin in front of a host's class: what the class asks of those who derive from it is not asked of the suite."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


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
            if isinstance(own.get("forward"), Patched):
                own["forward"] = own["forward"].patch
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
    made = tuned_class(cls, reads)
    module.__dict__[SEAT] = seat
    patch = module.__dict__.get("forward")
    module.__class__ = made  # type: ignore[assignment]
    if patch is not None:
        _patch(module, patch)


def unmake_host(module: nn.Module) -> None:
    """Give a module its original class back."""
    tuned = tuned_part(type(module))
    assert tuned is not None
    module.__class__ = rebased(type(module), tuned, tuned.base)
    patched = module.__dict__.get("forward")
    if isinstance(patched, Patched):
        module.__dict__["forward"] = patched.patch
    del module.__dict__[SEAT]
    module._modules.pop(CHILD, None)


PRODUCTS = {module.forward for module in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)}
"""Forwards that do nothing but multiply by the module's weight."""


def multiplies(module: nn.Module) -> bool:
    """Whether a module's forward is the plain product by its weight, so that parts may make it, or add to it.

    Where it is anything else (a patch, a standardised weight, a scale of its own), parts answer for the weight.
    """
    base: Any = original_class(module)
    if "forward" in module.__dict__:
        return False
    return packs(base) or (base.forward in PRODUCTS and "weight" in module._parameters)
