"""Stacked weights [experts, o, i] under parts: a tuned weight of each expert, and products by all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmpeft.hosting.weights import ANSWERS, Answer, Operand, Seen, Weight, Wrapper
from mmpeft.parts.base import Part, cast
from mmpeft.parts.product import Apply, Inner, StackReading
from mmpeft.parts.tuned import Tuned, in_graph
from mmpeft.types import AnyFunc, Args, Argument, Kwargs


class Stack(Wrapper):
    """A tuned stack as code reads it: of one expert a tuned weight, of all of them a product, else the values.

    It is seen as `dtype`, with the matrices the other way round if `swapped`, and as those of the experts `picked`, one
    for each row of what it multiplies, if code has picked them.
    """

    host: nn.Module
    attribute: str
    base: Tensor
    parts: tuple[Part, ...]
    picked: Tensor | None
    swapped: bool

    @classmethod
    def read(cls, host: nn.Module, attribute: str, base: Tensor, parts: tuple[Part, ...]) -> Tensor:
        facts = {"host": host, "attribute": attribute, "base": base, "parts": parts, "picked": None, "swapped": False}
        return in_graph(_Made(facts, base.dtype))

    def other(self, dtype: torch.dtype | None = None, **changes: Argument) -> Tensor:
        """The same stack seen otherwise."""
        names = ("host", "attribute", "base", "parts", "picked", "swapped")
        facts = {name: self.__dict__[name] for name in names} | changes
        return in_graph(_Made(facts, dtype or self.seen.dtype))

    @property
    def transposed(self) -> bool:
        """Whether it is stored as matrices [i, o]."""
        return bool(getattr(self.parts[0], "transposed", False))

    def formed(self) -> Tensor:
        if self.picked is None:
            found = self.base
            for part in self.parts:
                found = part.read(self.host, self.attribute, found)
        else:
            experts, back = self.picked.unique(return_inverse=True)
            return torch.stack([_formed(self.one(int(expert))) for expert in experts])[back]
        return cast(found.mT if self.swapped else found, self.seen.dtype)

    def one(self, expert: int) -> Tensor:
        """The tuned weight of one expert, as it is seen."""
        parts = tuple(part.one(expert) for part in self.parts)
        found = cast(Tuned.read(self.host, self.attribute, self.base[expert], parts), self.seen.dtype)
        return found.t() if self.swapped else found

    def times_all(self, x: Operand, run: Apply, left: bool, experts: Tensor | None = None) -> Answer:
        """`run(x, matrices)`, multiplied from the `left` or not; `experts` are those of the rows of x, if in groups."""
        turned = self.transposed != self.swapped
        if not isinstance(x, Tensor) or isinstance(x, Weight) or x.dim() < 2 or left == turned:
            return NotImplemented
        if x.dtype != self.seen.dtype and not torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        grouped, index = experts is not None, self.picked

        def apply(x: Tensor, kernel: Tensor) -> Tensor:
            kernel = cast(kernel, x.dtype)
            if kernel.dim() == 2:
                return kernel @ x if left else x @ kernel.t()
            chosen = kernel if index is None else kernel[index]
            return run(x, chosen if left else chosen.mT)

        def spread(vectors: Tensor) -> Tensor:
            if grouped:
                return vectors[experts]
            return (vectors if index is None else vectors[index]).unsqueeze(-1 if left else -2)

        weight = self.base.mT if self.transposed else self.base
        reading = StackReading(weight, apply, spread, -2 if left else -1)
        inner: Inner = partial(apply, kernel=weight)
        for part in self.parts:
            inner = partial(part.through_stack, reading, inner)
        return inner(x)

    @classmethod
    def __torch_function__(cls, func: AnyFunc, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        grouped = "grouped_mm" in getattr(func, "__name__", "")
        answer = _grouped if grouped else STACK_ANSWERS.get(func)
        found = NotImplemented if answer is None else answer(func, *args, **kwargs)
        if found is not NotImplemented:
            return found
        if func in ANSWERS:  # which is for single matrices
            return func(*tree_map(_formed, args), **tree_map(_formed, kwargs))
        return super().__torch_function__(func, types, args, kwargs)


class _Made(NamedTuple):
    """A stack to be made, and to be made again for its values."""

    facts: Kwargs
    dtype: torch.dtype

    def __call__(self) -> Stack:
        base, index, swapped = self.facts["base"], self.facts["picked"], self.facts["swapped"]
        rows, columns = base.shape[-2:]
        shape = (len(base) if index is None else len(index), *((columns, rows) if swapped else (rows, columns)))
        strides = (rows * columns, 1, columns) if swapped else None
        found = Tensor._make_wrapper_subclass(Stack, shape, strides, dtype=self.dtype, device=base.device)
        found.__dict__.update(self.facts, full=torch.Size(shape), place=base.device)
        found.__dict__["seen"] = Seen(0, shape[-2], self.dtype)
        return found


def _formed(value: Operand) -> Operand:
    return value.formed() if isinstance(value, Weight) else value


# -- looks ------------------------------------------------------------------------------------------------------


def _item(_: object, stack: Stack, index: Operand) -> Answer:
    if isinstance(index, tuple):
        if not index or not all(part is Ellipsis or part == slice(None) for part in index[1:]):
            return NotImplemented
        index = index[0]
    if stack.picked is not None or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.dtype == torch.bool or index.dim() > 1 or isinstance(index, Weight):
            return NotImplemented
        return stack.one(int(index)) if index.dim() == 0 else stack.other(picked=index)
    if not isinstance(index, int) or not -len(stack.base) <= index < len(stack.base):
        return NotImplemented
    return stack.one(index % len(stack.base))


def _select(_: object, stack: Stack, dim: int, index: Operand) -> Answer:
    return _item(_, stack, index) if dim in (0, -3) else NotImplemented


def _unbind(_: object, stack: Stack, dim: int = 0) -> Answer:
    if stack.picked is not None or dim not in (0, -3):
        return NotImplemented
    return tuple(stack.one(expert) for expert in range(len(stack.base)))


def _iterate(_: object, stack: Stack) -> Answer:
    found = _unbind(_, stack)
    return found if found is NotImplemented else iter(found)


def _swap(_: object, stack: Stack, *dims: Argument, **named: Argument) -> Answer:
    dims = tuple(d % 3 for d in (*dims, *named.values()))
    return stack.other(swapped=not stack.swapped) if not dims or sorted(dims) == [1, 2] else NotImplemented


def _permute(_: object, stack: Stack, *dims: Argument) -> Answer:
    dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return _swap(_, stack) if [d % 3 for d in dims] == [0, 2, 1] else NotImplemented


def _to(_: object, stack: Operand, dtype: Operand = None, **named: Argument) -> Answer:
    dtype = named.pop("dtype", dtype)
    if named or not isinstance(stack, Stack) or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    return stack if dtype == stack.seen.dtype else stack.other(dtype)


def _cast(dtype: torch.dtype) -> AnyFunc:
    return lambda _, stack: _to(_, stack, dtype)


def _itself(_: object, stack: Stack) -> Answer:
    return stack


# -- products ---------------------------------------------------------------------------------------------------


def _bmm(run: Callable[..., Tensor]) -> AnyFunc:
    def answer(_: object, one: Operand, other: Operand = None, **named: Argument) -> Answer:
        other = next(iter(named.values()), other)
        if isinstance(other, Stack):
            return other.times_all(one, run, left=False)
        return one.times_all(other, lambda x, kernel: run(kernel, x), left=True)

    return answer


def _reflected(_: object, stack: Stack, x: Operand) -> Answer:
    return stack.times_all(x, torch.matmul, left=False)


def _baddbmm(_: object, bias: Operand, one: Operand, other: Operand, *, beta: float = 1, alpha: float = 1) -> Answer:
    if isinstance(bias, Weight):
        return NotImplemented
    y = _bmm(torch.bmm)(_, one, other)
    return y if y is NotImplemented else y * alpha + bias * beta


def _grouped(
    func: AnyFunc, x: Operand, stack: Operand = None, offs: Operand = None, *rest: object, **named: Argument
) -> Answer:
    """Rows up to each of `offs` by one matrix after the other."""
    if not isinstance(stack, Stack) or stack.picked is not None or offs is None or any(v is not None for v in rest):
        return NotImplemented
    if any(value is not None for value in named.values()):
        return NotImplemented
    places = torch.arange(len(x), device=offs.device, dtype=offs.dtype)
    experts = torch.searchsorted(offs, places, right=True).clamp_max(len(stack.base) - 1)

    def run(x: Tensor, kernel: Tensor) -> Tensor:
        inputs, outputs = (-size % (16 // kernel.element_size()) for size in kernel.shape[-2:])
        if outputs:  # kernels want whole multiples of 16 bytes
            return run(x, F.pad(kernel, (0, outputs)))[..., :-outputs]
        if inputs:
            x, kernel = F.pad(x, (0, inputs)), F.pad(kernel, (0, 0, 0, inputs))
        found: Tensor = func(x, kernel, offs=offs)
        if found.requires_grad:
            found.register_hook(Tensor.contiguous)  # nor do they take gradients that lie between others
        return found

    return stack.times_all(x, run, left=False, experts=experts)


def _both(name: str) -> list[AnyFunc]:
    return [getattr(owner, name) for owner in (torch, Tensor) if hasattr(owner, name)]


STACK_ANSWERS: dict[object, AnyFunc] = {
    Tensor.__getitem__: _item,
    Tensor.__iter__: _iterate,
    Tensor.__rmatmul__: _reflected,
    Tensor.mT.__get__: _swap,  # type: ignore[attr-defined]  # what torch hands to overrides
    Tensor.to: _to,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.half: _cast(torch.float16),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.contiguous: _itself,
    **dict.fromkeys(_both("select"), _select),
    **dict.fromkeys(_both("index_select"), _select),
    **dict.fromkeys(_both("unbind"), _unbind),
    **dict.fromkeys((*_both("transpose"), *_both("swapaxes"), *_both("swapdims")), _swap),
    **dict.fromkeys(_both("permute"), _permute),
    **dict.fromkeys(_both("bmm"), _bmm(torch.bmm)),
    **dict.fromkeys((*_both("matmul"), Tensor.__matmul__), _bmm(torch.matmul)),
    **dict.fromkeys(_both("baddbmm"), _baddbmm),
}
"""`answer(function, *args, **kwargs)` for each function that a stack knows how to answer."""
