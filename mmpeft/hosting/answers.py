"""How a weight answers the functions of torch that multiply by it, and those that only look at it otherwise."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from types import FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.hosting.weights import ANSWERS, Answer, Operand, Weight
from mmpeft.types import AnyFunc, Argument, Untyped

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def opened(function: AnyFunc, **names: AnyFunc) -> AnyFunc:
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


# -- products ---------------------------------------------------------------------------------------------------


def _linear(_: object, x: Operand = None, weight: Operand = None, bias: Operand = None, **named: Argument) -> Answer:
    x = named.get("input", x)
    if not isinstance(weight, Weight) or weight.seen.flipped or len(weight.full) != 2 or weight.seen.k:
        return NotImplemented
    return weight.times(x, bias)


def _matmul(_: object, left: Operand, right: Operand = None, **named: Argument) -> Answer:
    right = next(iter(named.values()), right)
    if isinstance(right, Weight):
        return right.times(left, None) if right.seen.flipped else NotImplemented
    if left.seen.flipped or left.seen.k or len(left.full) != 2 or not isinstance(right, Tensor) or not right.dim():
        return NotImplemented
    if right.dim() == 1:
        return left.times(right, None)
    y = left.times(right.transpose(-2, -1), None)
    return y if y is NotImplemented else y.transpose(-2, -1)


def _reflected(_: object, weight: Operand, x: Operand) -> Answer:
    return _matmul(_, x, weight)


def _addmm(_: object, bias: Operand, left: Operand, right: Operand, *, beta: float = 1, alpha: float = 1) -> Answer:
    if not isinstance(right, Weight) or not right.seen.flipped or isinstance(bias, Weight):
        return NotImplemented
    if beta == alpha == 1 and bias.dim() == 1:
        return right.times(left, bias)
    y = right.times(left, None)
    return y if y is NotImplemented else y * alpha + bias * beta


def _conv(
    func: AnyFunc,
    x: Operand = None,
    weight: Operand = None,
    bias: Operand = None,
    stride: Operand = 1,
    padding: Operand = 0,
    dilation: Operand = 1,
    groups: int = 1,
    **named: Argument,
) -> Answer:
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
    _: object,
    words: Operand,
    weight: Operand,
    padding_idx: Operand = None,
    max_norm: Operand = None,
    *rest: object,
    **named: Argument,
) -> Answer:
    """A table [words, d]: of a weight [d, words] that is seen flipped."""
    plain = max_norm is None and not any(rest[1:]) and not any(named.get(n) for n in ("scale_grad_by_freq", "sparse"))
    seen = weight.seen
    if not plain or not seen.flipped or seen.stop - seen.start != weight.full[0]:
        return NotImplemented
    return weight.look_up(words, padding_idx)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Answer:
    """`F.linear` for code that is itself an answer: there compilers ask a weight no more."""
    if not isinstance(weight, Weight):
        return F.linear(x, weight, bias)
    found = _linear(None, x, weight, bias)
    return F.linear(x, weight.formed(), bias) if found is NotImplemented else found


def _packed(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None) -> Answer:
    """Queries, keys and values by one weight."""
    if (k is v and q is k) or not isinstance(weight, Weight):
        return _one_product(q, k, v, weight, bias)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    pieces = _chunk(None, weight, 3)
    return [_product(x, piece, b) for x, piece, b in zip((q, k, v), pieces, biases)]


_torch: Untyped = F  # of which some is private
_one_product = opened(_torch._in_projection_packed, linear=_product)
multi_head = opened(
    F.multi_head_attention_forward,
    linear=_product,
    _in_projection_packed=_packed,
    _in_projection=opened(_torch._in_projection, linear=_product),
)


def _attention(_: object, *args: Argument, **kwargs: Argument) -> Answer:
    return multi_head(*args, **kwargs)


# -- looks ------------------------------------------------------------------------------------------------------


def _flip(_: object, weight: Weight, *dims: Argument, **named: Argument) -> Answer:
    seen, dims = weight.seen, dims or tuple(named.values())
    if len(weight.full) != 2 or seen.k or (dims and sorted(d % 2 for d in dims) != [0, 1]):
        return NotImplemented
    return weight.again(seen._replace(flipped=not seen.flipped))


def _permute(_: object, weight: Weight, *dims: Argument) -> Answer:
    dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if len(weight.full) != 2 or weight.seen.k or len(dims) != 2:
        return NotImplemented
    return _flip(_, weight) if [d % 2 for d in dims] == [1, 0] else weight


def _to(_: object, weight: Tensor, *args: Argument, **named: Argument) -> Answer:
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


def _cast(dtype: torch.dtype) -> AnyFunc:
    def answer(_: object, weight: Weight, **named: Argument) -> Answer:
        return NotImplemented if named else _to(_, weight, dtype)

    return answer


def _itself(_: object, weight: Weight, **named: Argument) -> Answer:
    return NotImplemented if named else weight


def _cut(weight: Weight, dim: int, sizes: Sequence[int]) -> Answer:
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


def _split(
    _: object, weight: Weight, split_size_or_sections: int | Sequence[int] = 1, dim: int = 0, **named: Argument
) -> Answer:
    sizes, rows = named.get("split_size", split_size_or_sections), weight.seen.stop - weight.seen.start
    if isinstance(sizes, int):
        sizes = [min(sizes, rows - at) for at in range(0, rows, sizes)]
    return _cut(weight, dim, sizes) if sum(sizes) == rows else NotImplemented


def _chunk(_: object, weight: Weight, chunks: int, dim: int = 0) -> Answer:
    rows = weight.seen.stop - weight.seen.start
    return _split(_, weight, -(-rows // chunks), dim)


def _narrow(_: object, weight: Weight, dim: int, start: int | Tensor, length: int) -> Answer:
    if not isinstance(start, int) or start < 0:
        return NotImplemented
    pieces = _cut(weight, dim, [start, length])
    return pieces if pieces is NotImplemented else pieces[1]


def _item(_: object, weight: Weight, index: Operand) -> Answer:
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


def _unbind(_: object, weight: Weight, dim: int = 0) -> Answer:
    seen = weight.seen
    if not seen.k or dim:
        return NotImplemented
    size = (seen.stop - seen.start) // seen.k
    return _cut(weight.again(seen._replace(k=0)), 0, [size] * seen.k)


def _view(_: object, weight: Weight, *shape: Argument, **named: Argument) -> Answer:
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


def _unflatten(_: object, weight: Weight, dim: int, sizes: Sequence[int]) -> Answer:
    return _view(_, weight, *sizes, weight.full[1]) if dim == 0 and len(sizes) == 2 else NotImplemented


def _both(name: str) -> list[AnyFunc]:
    """A function of `torch` and the method of the same name, where there are both."""
    return [getattr(owner, name) for owner in (torch, Tensor) if hasattr(owner, name)]


ANSWERS |= {
    F.linear: _linear,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.embedding: _embedding,
    torch.embedding: lambda *_: NotImplemented,
    F.multi_head_attention_forward: _attention,
    Tensor.__rmatmul__: _reflected,
    Tensor.__getitem__: _item,
    **{getattr(Tensor, name).__get__: _flip for name in ("T", "mT")},
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
