"""Weights that answer: known by what they do to an input, and by their values only where these are asked for.

A quantised weight, or one that is tuned, is a frozen tensor and a rule. Code that multiplies by it gets the
rule's own product, whatever function it calls and however it looks at the weight (transposed, cast, some of its rows).
Anything else gets the values, formed for the occasion and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mmpeft.errors import Refused
from mmpeft.types import AnyFunc, Args, Argument, Kwargs, TorchOp

Operand: TypeAlias = Any
"""What a function of torch was given: a tensor, a weight, a number, or what only torch's own errors are for."""
Answer: TypeAlias = Any
"""What the function would return: a tensor or several; NotImplemented where the values serve as well."""


class Seen(NamedTuple):
    """How a weight [o, i, ...] is looked at: rows `start:stop`, as `dtype`, [i, o] if `flipped`, [k, o/k, i] if `k`."""

    start: int
    stop: int
    dtype: torch.dtype
    flipped: bool = False
    k: int = 0

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        rows, rest = self.stop - self.start, tuple(full[1:])
        if self.k:
            return (self.k, rows // self.k, *rest)
        return (*rest, rows) if self.flipped else (rows, *rest)

    def of(self, values: Tensor) -> Tensor:
        """The same look at plain values [o, i, ...]."""
        if self.stop - self.start != len(values):
            values = values[self.start : self.stop]
        if values.dtype != self.dtype:
            values = values.to(self.dtype)
        if self.k:
            values = values.unflatten(0, (self.k, -1))
        elif self.flipped:
            values = values.t()
        return values


class Weight(Tensor):
    """A weight that answers; subclasses say how.

    `product(x, bias, start, stop)` is `x Wᵀ + b` for rows `start:stop` of W [o, i], `convolution` and `look_up` the
    like for kernels and tables, each `NotImplemented` where the values serve as well; `values()` are all of W.
    """

    full: torch.Size
    """[o, i, ...], however it is seen."""
    seen: Seen

    def values(self) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None, start: int, stop: int) -> Answer:
        return NotImplemented

    def convolution(self, run: Callable[..., Tensor], x: Tensor, bias: Tensor | None, options: Args) -> Answer:
        return NotImplemented

    def look_up(self, words: Tensor, padding_idx: int | None) -> Answer:
        return NotImplemented

    def again(self, seen: Seen) -> Weight:
        """The same weight seen otherwise."""
        raise NotImplementedError

    def formed(self) -> Tensor:
        """The values as they are seen."""
        return self.seen.of(self.values())

    def fact(self, func: AnyFunc, *args: Argument, **kwargs: Argument) -> object:
        """What code asks of a tensor without reading its values."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(self, *args, **kwargs)

    def times(self, x: Operand, bias: Tensor | None) -> Answer:
        """`x Wᵀ + b` for the rows that are seen, if nothing is wrong with x."""
        seen = self.seen
        if not isinstance(x, Tensor) or isinstance(x, Weight) or x.dim() == 0 or x.shape[-1] != self.full[1]:
            return NotImplemented
        if x.dtype != seen.dtype and not torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        return self.product(x, bias, seen.start, seen.stop)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]  # torch's takes more
        return f"{type(self).__name__}({self.seen.shape(self.full)})"

    @classmethod
    def __torch_function__(cls, func: AnyFunc, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        if answer is not None:
            found = answer(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        elif func in FACTS and isinstance(args[0], Weight):
            return args[0].fact(func, *args[1:], **kwargs)
        elif _changes(func) and isinstance(args[0], Weight):
            raise Refused(
                f"{func.__name__} would change a weight that is computed on reading, and be lost: change the module's "
                "own parameter (model.get_parameter(...)) or the tuning's"
            )
        return func(*tree_map(_formed, args), **tree_map(_formed, kwargs))


class Wrapper(Weight):
    """A weight without storage: what gets past the functions of `torch` finds the values as well."""

    place: torch.device

    @classmethod
    def of(cls, full: torch.Size, seen: Seen, device: torch.device, **facts: Argument) -> Self:
        shape = seen.shape(full)
        strides = (1, shape[0]) if seen.flipped else None
        found: Self = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=seen.dtype, device=device)
        found.__dict__.update(facts, full=full, seen=seen, place=device)
        return found

    def again(self, seen: Seen) -> Weight:
        facts = {name: value for name, value in self.__dict__.items() if name not in ("full", "seen", "place")}
        return type(self).of(self.full, seen, self.place, **facts)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: TorchOp, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        return func(*tree_map(_formed, args), **tree_map(_formed, kwargs or {}))


def _formed(value: Operand) -> Operand:
    return value.formed() if isinstance(value, Weight) else value


def _changes(func: AnyFunc) -> bool:
    """Whether a function changes its first argument in place."""
    name: str = getattr(func, "__name__", "")
    plain = name.endswith("_") and not name.endswith("__")
    return plain or name in ("__set__", "__setitem__") or (name.startswith("__i") and name in _IN_PLACE)


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


ANSWERS: dict[object, AnyFunc] = {}
"""`answer(function, *args, **kwargs)` for each function that a weight knows how to answer; `answers` fills it in."""

_VALUED = ("T", "mT", "H", "mH", "data", "real", "imag")
_METHODS = (
    *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "register_hook", "retain_grad"),
    *("__len__", "__repr__"),
)
FACTS: set[object] = {
    *(getattr(Tensor, name) for name in ("size", "dim", "stride", "numel", "nelement", "ndimension", "element_size")),
    *(
        getattr(Tensor, name)
        for name in ("is_floating_point", "is_complex", "is_contiguous", "is_inference", "__len__")
    ),
    *(getattr(Tensor, name) for name in ("get_device", "storage_offset", "register_hook", "retain_grad", "__repr__")),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference),
    *(
        getattr(Tensor, name).__get__
        for name in dir(Tensor)
        if name not in _VALUED and type(getattr(Tensor, name)).__name__ in ("getset_descriptor", "property")
    ),
}
"""What code asks of a tensor without reading its values."""
