"""A module that hosts parts: the class swap, and the forward pass around the parts.

Follows PyTorch's own `fully_shard` and `parametrize`: the module keeps its object, its type (a cached subclass of the
same name, so `isinstance` still holds), its forward's signature and every state-dict key; the parts hang under it as
one child named `mmpeft`. Only `mmpeft.surgery.attaching` performs it.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.hosting.forward import Seat, forward_of, plan_of
from mmpeft.hosting.modules import CHILD, SEAT
from mmpeft.hosting.offload import HOOK, Hooked, fetched
from mmpeft.hosting.patched import Patched
from mmpeft.hosting.quantized import packs, viewed
from mmpeft.hosting.still import MODE, Still
from mmpeft.types import AnyModule, Argument, Attribute, Forward, Output

GUARDS: dict[str, Callable[..., None]] = {}
"""Methods by which models change their own modules, and what refuses a call of one on a host; domains fill it in."""

BASE = "mmpeft_base"
"""Where a swapped class keeps the original one. All its names are such: a module may call its own ones anything."""


class TunedMeta(type):
    """Metaclass of the swapped classes; picklable through the recipe that made them."""

    mmpeft_base: type
    mmpeft_reads: frozenset[str]
    mmpeft_packed: bool
    """Whether the module multiplies by its weight in a way of bitsandbytes' own."""

    def __str__(cls) -> str:
        """The backbone's own: transformers keeps by it which outputs a class can record."""
        return str(cls.mmpeft_base)


def tuned_part(cls: type) -> TunedMeta | None:
    """The swapped class in a class's hierarchy: itself, or one that other libraries have derived from; None without."""
    return next((c for c in cls.__mro__ if isinstance(c, TunedMeta) and BASE in vars(c)), None)


def _reduced(cls: TunedMeta) -> str | tuple[Callable[..., TunedMeta], tuple[object, ...]]:
    if BASE not in vars(cls):  # of another library, on top of a swapped one
        return cls.__qualname__
    return tuned_class, (cls.mmpeft_base, cls.mmpeft_reads)


copyreg.pickle(TunedMeta, _reduced)


def base_value(module: nn.Module, name: str) -> Attribute:
    """The backbone's own value of an attribute, whatever parts read it; a packed weight in its true shape.

    What accelerate holds elsewhere between passes is read from there.
    """
    for store in (module._parameters, module._buffers, module.__dict__):
        if name in store:
            return fetched(module, name, viewed(module, store[name]))
    own = getattr(original_class(module), name, None)
    if isinstance(own, property):  # of a parametrised module, which computes its weight
        return own.__get__(module)
    raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")


def is_sharded(value: object) -> bool:
    """Whether a tensor is one process's share of a distributed one."""
    return type(value) not in (Tensor, nn.Parameter) and type(value).__name__ == "DTensor"


def _reader(name: str) -> property:
    def read(self: AnyModule) -> Attribute:
        value = base_value(self, name)
        if is_sharded(value):  # asked for by who shards it: forward passes find it whole
            return value
        plan = plan_of(self)
        parts = plan.reads.get(name)
        return plan.answer(self, name, value, parts) if parts and plan.answer else value

    def write(self: AnyModule, value: Attribute) -> None:
        self.__dict__[name] = value

    return property(read, write)


def tuned_class(base: AnyModule, reads: frozenset[str]) -> TunedMeta:
    """The subclass of `base` that hosts parts and lets them answer for the attributes `reads`."""
    return _tuned_class(base, reads, base.forward)  # another one where the forward of `base` has been replaced


@cache
def _tuned_class(base: type, reads: frozenset[str], forward: Forward) -> TunedMeta:
    still = MODE in reads
    namespace: dict[str, object] = {name: _reader(name) for name in reads - {MODE}}
    namespace |= {name: _guarded(getattr(base, name), GUARDS[name]) for name in GUARDS if hasattr(base, name)}
    namespace |= {
        BASE: base,
        "mmpeft_reads": reads,
        "mmpeft_packed": packs(base),
        "forward": forward_of(base, Still.forward if still else None),
    }
    namespace |= {"__module__": base.__module__, "__doc__": base.__doc__, "__qualname__": base.__qualname__}
    namespace |= {"__setattr__": _setter(base), HOOK: Hooked(), "__prepare_scriptable__": _scriptable}
    return _meta(type(base))(base.__name__, (Hosting, *((Still,) if still else ()), base), namespace)


def _guarded(method: Forward, check: Callable[..., None]) -> Forward:
    @wraps(method)
    def guarded(self: AnyModule, *args: Argument, **kwargs: Argument) -> Output:
        if SEAT in self.__dict__:
            check(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return guarded


def _setter(base: AnyModule) -> Callable[[AnyModule, str, Attribute], None]:
    """`__setattr__` of a host of class `base`, which notices a forward that is put on the module.

    A tensor that parts answer with already, as a model that ties its weights once more gives it, stays theirs alone.
    """

    def setattr_(self: AnyModule, name: str, value: Attribute) -> None:
        theirs = isinstance(value, nn.Parameter) and value is not self._parameters.get(name)
        if theirs and value is getattr(self, name, None):
            return
        if name != "forward" or SEAT not in self.__dict__:
            base.__setattr__(self, name, value)
            return
        state = self.__dict__[SEAT].state
        with state.gate.alone(state):
            _patch(self, value)
            state.forget()  # whoever patches one module may go on with others: plans wait for the next pass

    return setattr_


def _patch(host: nn.Module, patch: Any) -> None:
    """Put a forward on a host, or take it off again."""
    own: AnyModule = original_class(host)
    if isinstance(patch, Patched) and patch.host is host:
        host.__dict__["forward"] = patch
    elif getattr(patch, "__self__", None) is host and patch.__func__ in (type(host).forward, own.forward):
        host.__dict__.pop("forward", None)
    else:
        host.__dict__["forward"] = Patched(host, patch)
        make_host(host, host.__dict__[SEAT], frozenset({"weight"} & host._parameters.keys()))


class Hosting:
    """Mixin in front of a host's class: what the class asks of those who derive from it is not asked of the suite."""

    def __init_subclass__(cls, **_: object) -> None:
        pass

    def _replicate_for_data_parallel(self) -> NoReturn:
        """What `nn.DataParallel` makes of a module for each of several devices, in every pass."""
        raise Refused(
            "nn.DataParallel runs shallow copies of a model in threads, and what a tuning runs belongs to the model "
            "itself: use DistributedDataParallel, or a single device (device_ids=[0])"
        )


@cache
def _meta(kind: type) -> type[TunedMeta]:
    """The metaclass for a base whose own metaclass is `kind` (abstract classes have one)."""
    if issubclass(TunedMeta, kind):
        return TunedMeta
    found = type(TunedMeta.__name__, (TunedMeta, kind), {"__module__": TunedMeta.__module__})
    copyreg.pickle(found, _reduced)
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
            cls: AnyModule = type(module) if tuned is None else rebased(type(module), tuned, tuned.mmpeft_base)
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


def original_class(module: nn.Module) -> type[nn.Module]:
    """A module's class as its library wrote it."""
    tuned = tuned_part(type(module))
    return type(module) if tuned is None else tuned.mmpeft_base


def is_host(module: nn.Module) -> bool:
    """Whether a module's class has been swapped."""
    return SEAT in module.__dict__


def make_host(module: nn.Module, seat: Seat, reads: frozenset[str]) -> None:
    """Swap a module's class, or widen the attributes that parts may answer for."""
    cls: type = type(module)
    tuned = tuned_part(cls)
    if tuned is not None:
        if not reads <= tuned.mmpeft_reads:
            module.__class__ = rebased(cls, tuned, tuned_class(tuned.mmpeft_base, reads | tuned.mmpeft_reads))
        return
    if isinstance(module, torch.jit.ScriptModule):
        raise Refused(f"{cls.__name__} is a TorchScript module; attach before scripting")
    made = tuned_class(cls, reads)
    module.__dict__[SEAT] = seat
    patch = module.__dict__.get("forward")
    module.__class__ = made  # type: ignore[assignment]  # the swap itself
    if patch is not None:
        _patch(module, patch)


def unmake_host(module: nn.Module) -> None:
    """Give a module its original class back."""
    tuned = tuned_part(type(module))
    assert tuned is not None
    module.__class__ = rebased(type(module), tuned, tuned.mmpeft_base)
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
    base: AnyModule = original_class(module)
    if "forward" in module.__dict__:
        return False
    return packs(base) or (base.forward in PRODUCTS and "weight" in module._parameters)
