"""Weights that answer: known by what they do to an input, and by their values only where these are asked for.

A weight that holds few bits, or one that is tuned, is a frozen tensor and a rule. Code that multiplies by it gets the
rule's own product, whatever function it calls and however it looks at the weight (transposed, cast, some of its rows).
Anything else gets the values, formed for the occasion and differentiable.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from mmpeft.errors import Refused


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
            return values.unflatten(0, (self.k, -1))  # type: ignore[no-untyped-call, no-any-return]
        return values.t() if self.flipped else values


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

    def product(self, x: Tensor, bias: Tensor | None, start: int, stop: int) -> Any:
        return NotImplemented

    def convolution(self, run: Callable[..., Tensor], x: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Any:
        return NotImplemented

    def look_up(self, words: Tensor, padding_idx: int | None) -> Any:
        return NotImplemented

    def again(self, seen: Seen) -> Weight:
        """The same weight seen otherwise."""
        raise NotImplementedError

    def formed(self) -> Tensor:
        """The values as they are seen."""
        return self.seen.of(self.values())

    def fact(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What code asks of a tensor without reading its values."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(self, *args, **kwargs)

    def times(self, x: Any, bias: Tensor | None) -> Any:
        """`x Wᵀ + b` for the rows that are seen, if nothing is wrong with x."""
        seen = self.seen
        if not isinstance(x, Tensor) or isinstance(x, Weight) or x.dim() == 0 or x.shape[-1] != self.full[1]:
            return NotImplemented
        if x.dtype != seen.dtype and not torch.is_autocast_enabled(x.device.type):
            return NotImplemented
        return self.product(x, bias, seen.start, seen.stop)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.seen.shape(self.full)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    def of(cls, full: torch.Size, seen: Seen, device: torch.device, **facts: Any) -> Any:
        shape = seen.shape(full)
        strides = (1, shape[0]) if seen.flipped else None
        found = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=seen.dtype, device=device)  # type: ignore
        found.__dict__.update(facts, full=full, seen=seen, place=device)
        return found

    def again(self, seen: Seen) -> Weight:
        facts = {name: value for name, value in self.__dict__.items() if name not in ("full", "seen", "place")}
        found: Weight = type(self).of(self.full, seen, self.place, **facts)
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_formed, args), **tree_map(_formed, kwargs or {}))


def opened(function: Any, **names: Any) -> Any:
    """A torch function that calls others, without its first question whether something handles it as a whole.

    Its names live in a module of their own, where compilers look them up; `names` stand in for some of them.
    """
    module = ModuleType(f"{__name__}.{function.__name__}")
    module.__dict__.update(function.__globals__)
    module.__dict__.update({"__name__": module.__name__, "has_torch_function": lambda _: False, **names})
    sys.modules[module.__name__] = module
    found = FunctionType(
        function.__code__, module.__dict__, function.__name__, function.__defaults__, function.__closure__
    )
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def _formed(value: Any) -> Any:
    return value.formed() if isinstance(value, Weight) else value


def _changes(func: Any) -> bool:
    """Whether a function changes its first argument in place."""
    name: str = getattr(func, "__name__", "")
    plain = name.endswith("_") and not name.endswith("__")
    return plain or name in ("__set__", "__setitem__") or (name.startswith("__i") and name in _IN_PLACE)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


# -- products ---------------------------------------------------------------------------------------------------


def _linear(_: Any, x: Any = None, weight: Any = None, bias: Any = None, **named: Any) -> Any:
    x = named.get("input", x)
    if not isinstance(weight, Weight) or weight.seen.flipped or len(weight.full) != 2 or weight.seen.k:
        return NotImplemented
    return weight.times(x, bias)


def _matmul(_: Any, left: Any, right: Any = None, **named: Any) -> Any:
    right = next(iter(named.values()), right)
    if isinstance(right, Weight):
        return right.times(left, None) if right.seen.flipped else NotImplemented
    if left.seen.flipped or left.seen.k or len(left.full) != 2 or not isinstance(right, Tensor) or not right.dim():
        return NotImplemented
    if right.dim() == 1:
        return left.times(right, None)
    y = left.times(right.transpose(-2, -1), None)
    return y if y is NotImplemented else y.transpose(-2, -1)


def _reflected(_: Any, weight: Any, x: Any) -> Any:
    return _matmul(_, x, weight)


def _addmm(_: Any, bias: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(right, Weight) or not right.seen.flipped or isinstance(bias, Weight):
        return NotImplemented
    if beta == alpha == 1 and bias.dim() == 1:
        return right.times(left, bias)
    y = right.times(left, None)
    return y if y is NotImplemented else y * alpha + bias * beta


def _conv(
    func: Any,
    x: Any = None,
    weight: Any = None,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    **named: Any,
) -> Any:
    x = named.get("input", x)
    if not isinstance(weight, Weight) or isinstance(x, Weight) or weight.seen.k or not isinstance(x, Tensor):
        return NotImplemented
    seen = weight.seen
    if seen.stop - seen.start != weight.full[0] or seen.flipped:
        return NotImplemented
    if x.dtype != seen.dtype and not torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    return weight.convolution(func, x, bias, (stride, padding, dilation, groups))


def _embedding(
    _: Any, words: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **named: Any
) -> Any:
    """A table [words, d]: of a weight [d, words] that is seen flipped."""
    plain = max_norm is None and not any(rest[1:]) and not any(named.get(n) for n in ("scale_grad_by_freq", "sparse"))
    seen = weight.seen
    if not plain or not seen.flipped or seen.stop - seen.start != weight.full[0]:
        return NotImplemented
    return weight.look_up(words, padding_idx)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """`F.linear` for code that is itself an answer: there compilers ask a weight no more."""
    if not isinstance(weight, Weight):
        return F.linear(x, weight, bias)
    found = _linear(None, x, weight, bias)
    return F.linear(x, weight.formed(), bias) if found is NotImplemented else found


def _packed(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Queries, keys and values by one weight."""
    if (k is v and q is k) or not isinstance(weight, Weight):
        return _one_product(q, k, v, weight, bias)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    pieces = _chunk(None, weight, 3)
    return [_product(x, piece, b) for x, piece, b in zip((q, k, v), pieces, biases)]


_one_product = opened(F._in_projection_packed, linear=_product)  # type: ignore[attr-defined]
multi_head = opened(
    F.multi_head_attention_forward,
    linear=_product,
    _in_projection_packed=_packed,
    _in_projection=opened(F._in_projection, linear=_product),  # type: ignore[attr-defined]
)


def _attention(_: Any, *args: Any, **kwargs: Any) -> Any:
    return multi_head(*args, **kwargs)


# -- looks ------------------------------------------------------------------------------------------------------


def _flip(_: Any, weight: Any, *dims: Any, **named: Any) -> Any:
    seen, dims = weight.seen, dims or tuple(named.values())
    if len(weight.full) != 2 or seen.k or (dims and sorted(d % 2 for d in dims) != [0, 1]):
        return NotImplemented
    return weight.again(seen._replace(flipped=not seen.flipped))


def _permute(_: Any, weight: Any, *dims: Any) -> Any:
    dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if len(weight.full) != 2 or weight.seen.k or len(dims) != 2:
        return NotImplemented
    return _flip(_, weight) if [d % 2 for d in dims] == [1, 0] else weight


def _to(_: Any, weight: Any, *args: Any, **named: Any) -> Any:
    if not isinstance(weight, Weight):  # another tensor goes where a weight is
        like = next(value for value in (*args, *named.values()) if isinstance(value, Weight))
        return weight.to(like.device, like.dtype)
    if set(named) - {"dtype", "device", "other", "non_blocking"}:
        return NotImplemented
    dtype = weight.seen.dtype
    for value in (*args, named.get("device"), named.get("dtype"), named.get("other")):
        if isinstance(value, Tensor):
            dtype, value = value.dtype, value.device
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            if torch.device(value) != weight.device:
                return NotImplemented
        elif value is not None and not isinstance(value, bool):
            return NotImplemented
    if dtype not in FLOATS or True in args[1:]:  # a copy was asked for
        return NotImplemented
    return weight if dtype == weight.seen.dtype else weight.again(weight.seen._replace(dtype=dtype))


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def answer(_: Any, weight: Any, **named: Any) -> Any:
        return NotImplemented if named else _to(_, weight, dtype)

    return answer


def _itself(_: Any, weight: Any, **named: Any) -> Any:
    return NotImplemented if named else weight


def _cut(weight: Weight, dim: int, sizes: Sequence[int]) -> Any:
    """The pieces of a weight along its rows."""
    seen = weight.seen
    if seen.k or dim % len(weight.full) != (len(weight.full) - 1 if seen.flipped else 0):
        return NotImplemented
    edges = [seen.start]
    for size in sizes:
        edges.append(edges[-1] + size)
    if edges[-1] > seen.stop:
        return NotImplemented
    return tuple(weight.again(seen._replace(start=a, stop=b)) for a, b in pairwise(edges))


def _split(_: Any, weight: Any, split_size_or_sections: Any = 1, dim: int = 0, **named: Any) -> Any:
    sizes, rows = named.get("split_size", split_size_or_sections), weight.seen.stop - weight.seen.start
    if isinstance(sizes, int):
        sizes = [min(sizes, rows - at) for at in range(0, rows, sizes)]
    return _cut(weight, dim, sizes) if sum(sizes) == rows else NotImplemented


def _chunk(_: Any, weight: Any, chunks: int, dim: int = 0) -> Any:
    rows = weight.seen.stop - weight.seen.start
    return _split(_, weight, -(-rows // chunks), dim)


def _narrow(_: Any, weight: Any, dim: int, start: Any, length: int) -> Any:
    if not isinstance(start, int) or start < 0:
        return NotImplemented
    pieces = _cut(weight, dim, [start, length])
    return pieces if pieces is NotImplemented else pieces[1]


def _item(_: Any, weight: Any, index: Any) -> Any:
    seen = weight.seen
    index = index if isinstance(index, tuple) else (index,)
    if seen.k:
        return _unbind(_, weight)[index[0]] if len(index) == 1 and isinstance(index[0], int) else NotImplemented
    if seen.flipped and len(index) == 2:
        index = index[::-1]
    elif seen.flipped:
        return NotImplemented
    whole = all(part is Ellipsis or part == slice(None) for part in index[1:])
    if not whole or not isinstance(index[0], slice) or len(index) > len(weight.full):
        return NotImplemented
    start, stop, step = index[0].indices(seen.stop - seen.start)
    if step != 1:
        return NotImplemented
    return weight.again(seen._replace(start=seen.start + start, stop=seen.start + max(start, stop)))


def _unbind(_: Any, weight: Any, dim: int = 0) -> Any:
    seen = weight.seen
    if not seen.k or dim:
        return NotImplemented
    size = (seen.stop - seen.start) // seen.k
    return _cut(weight.again(seen._replace(k=0)), 0, [size] * seen.k)


def _view(_: Any, weight: Any, *shape: Any, **named: Any) -> Any:
    """A stack of equal blocks of rows, or the matrix that it was."""
    shape = shape or tuple(named.values())
    if not shape or isinstance(shape[0], torch.dtype) or weight.seen.flipped or len(weight.full) != 2:
        return NotImplemented
    shape = tuple(shape) if isinstance(shape[0], int) else tuple(shape[0])
    rows, columns = weight.seen.stop - weight.seen.start, weight.full[1]
    if len(shape) not in (2, 3) or sum(n < 0 for n in shape) > 1:
        return NotImplemented
    known = math.prod(n for n in shape if n >= 0)
    shape = tuple(n if n >= 0 else rows * columns // max(known, 1) for n in shape)
    if math.prod(shape) != rows * columns or shape[-1] != columns:
        return NotImplemented
    return weight.again(weight.seen._replace(k=shape[0] if len(shape) == 3 else 0))


def _unflatten(_: Any, weight: Any, dim: int, sizes: Any) -> Any:
    return _view(_, weight, *sizes, weight.full[1]) if dim == 0 and len(sizes) == 2 else NotImplemented


def _both(name: str) -> list[Any]:
    """A function of `torch` and the method of the same name, where there are both."""
    return [getattr(owner, name) for owner in (torch, Tensor) if hasattr(owner, name)]


ANSWERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.embedding: _embedding,
    torch.embedding: lambda *_: NotImplemented,
    F.multi_head_attention_forward: _attention,
    Tensor.__rmatmul__: _reflected,
    Tensor.__getitem__: _item,
    Tensor.T.__get__: _flip,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _flip,  # type: ignore[attr-defined]
    Tensor.type_as: _to,
    Tensor.to: _to,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.half: _cast(torch.float16),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.contiguous: _itself,
    Tensor.view: _view,
    **dict.fromkeys((*_both("matmul"), *_both("mm"), *_both("mv"), Tensor.__matmul__), _matmul),
    **dict.fromkeys(_both("addmm"), _addmm),
    **dict.fromkeys((*_both("t"), *_both("transpose"), *_both("swapaxes"), *_both("swapdims")), _flip),
    **dict.fromkeys(_both("permute"), _permute),
    **dict.fromkeys(_both("split"), _split),
    **dict.fromkeys(_both("chunk"), _chunk),
    **dict.fromkeys(_both("narrow"), _narrow),
    **dict.fromkeys(_both("unbind"), _unbind),
    **dict.fromkeys(_both("reshape"), _view),
    **dict.fromkeys(_both("unflatten"), _unflatten),
}
"""`answer(function, *args, **kwargs)` for each function that a weight may know how to answer."""

_VALUED = ("T", "mT", "H", "mH", "data", "real", "imag")
_METHODS = (
    *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "register_hook", "retain_grad"),
    *("__len__", "__repr__"),
)
FACTS: set[Any] = {
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
