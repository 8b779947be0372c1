"""One autograd function for a frozen linear and its low-rank updates.

PyTorch's composed `F.linear(x, W) + s·F.linear(F.linear(x, A), B)` keeps `x` and `A x` for the backward pass
and, under autocast, a low-precision copy of every frozen weight as well. `low_rank_linear` keeps `x` once (in
the compute type), references the frozen weight, and forms the rank-r product again in the backward pass.

Two exact evaluations are used, whichever moves fewer bytes:

* *apply*: `y = W x + s B (A x)`;
* *effective weight*: `y = (W + s B A) x`, one product of the frozen layer's own size. It wins once the batch
  has more rows than the weight (`N (i + 2o) > 2 o i`) and is used only in full fp32/fp64 arithmetic, where
  adding a small update to the weight loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mmpeft.errors import Refused
from mmpeft.types import Ctx

Spans = tuple[tuple[int, int, float, bool], ...]


class Update(NamedTuple):
    """A low-rank update of output rows `start:stop`: `A [r, i]`, `B [n, r]`, scale and, for DoRA, gains `[n]`.

    The rows become `g ⊙ (W + s B A)` with `n = stop - start`.
    """

    start: int
    stop: int
    scale: float
    down: Tensor
    up: Tensor
    gain: Tensor | None = None


def effective_weight(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """`g ⊙ (W + s B A)` on the rows of each update, `W` elsewhere; a new [o, i] tensor."""
    whole = len(updates) == 1 and updates[0].stop - updates[0].start == len(weight)
    out = weight if whole else weight.clone()
    for u in updates:
        if whole:
            out = torch.addmm(weight, u.up, u.down, alpha=u.scale)
        else:
            out[u.start : u.stop].addmm_(u.up, u.down, alpha=u.scale)
        if u.gain is not None:
            out[u.start : u.stop] *= u.gain[:, None]
    return out


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """`y = g ⊙ (W + s B A) x + b` for a frozen `W`, differentiable in x, b and every A, B and g.

    `x` is [..., i], `weight` [o, i]; under autocast the product runs in the autocast type. Hu et al. 2021
    (arXiv:2106.09685); Liu et al. 2024 (arXiv:2402.09353) for the gains.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    spans = tuple((u.start, u.stop, u.scale, u.gain is not None) for u in updates)
    tensors = [t for u in updates for t in u[3:] if t is not None]
    flat: Tensor = _LowRankLinear.apply(x, weight, bias, dtype, spans, *tensors)
    return flat.view(*x.shape[:-1], len(weight))  # out here: of a view made inside nothing may be changed in place


def low_rank_composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    dropouts: Sequence[float] = (),
) -> Tensor:
    """`low_rank_linear` from PyTorch's own operations: any weight, dropout on the update's input, compilable."""
    gained = any(u.gain is not None for u in updates)
    y = F.linear(x, weight, None if gained else bias)
    for u, rate in zip(updates, dropouts or [0.0] * len(updates)):
        source = F.dropout(x, rate) if rate else x
        delta = F.linear(F.linear(source, _cast(u.down, x.dtype)), _cast(u.up, x.dtype))
        whole = u.stop - u.start == y.shape[-1]
        part = torch.add(y if whole else y[..., u.start : u.stop], delta, alpha=u.scale)
        if u.gain is not None:
            part = part * _cast(u.gain, part.dtype)
        y = part if whole else y.slice_scatter(part, -1, u.start, u.stop)
    return y if bias is None or not gained else y + bias


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _updates(spans: Spans, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Update]:
    queue = iter([_cast(t, dtype) for t in tensors])
    return [
        Update(start, stop, scale, next(queue), next(queue), next(queue) if gained else None)
        for start, stop, scale, gained in spans
    ]


def _exact(tensor: Tensor) -> bool:
    """Whether a product keeps fp32 accuracy, so that `W + sBA` may be rounded to the weight's type."""
    if tensor.dtype == torch.float64:
        return True
    return tensor.dtype == torch.float32 and (tensor.device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32)


def _product(flat: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update], effective: bool) -> Tensor:
    frozen = _cast(weight, flat.dtype)
    offset = None if bias is None else _cast(bias, flat.dtype)
    if effective:
        return F.linear(flat, effective_weight(frozen, updates), offset)
    gained = any(u.gain is not None for u in updates)
    y = F.linear(flat, frozen, None if gained else offset)
    for u in updates:
        part = y[:, u.start : u.stop]
        part.addmm_((u.down @ flat.t()).t(), u.up.t(), alpha=u.scale)
        if u.gain is not None:
            part *= u.gain
    if gained and offset is not None:
        y += offset
    return y


@torch.library.custom_op("mmpeft::low_rank_linear", mutates_args=())
def _low_rank_op(
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    effective: bool,
    bounds: list[int],
    scales: list[float],
    gained: list[bool],
    tensors: list[Tensor],
) -> Tensor:
    spans = tuple(zip(bounds[::2], bounds[1::2], scales, gained))
    return _product(flat, weight, bias, _updates(spans, tensors, flat.dtype), effective)


LOW_RANK_OP = torch.ops.mmpeft.low_rank_linear.default


def _opaque(
    flat: Tensor, weight: Tensor, bias: Tensor | None, effective: bool, spans: Spans, tensors: Sequence[Tensor]
) -> Tensor:
    """The same product as one operation: what selective recomputation should see, and keep the result of."""
    bounds = [edge for start, stop, _, _ in spans for edge in (start, stop)]
    scales, gained = [span[2] for span in spans], [span[3] for span in spans]
    y: Tensor = _low_rank_op(flat, weight, bias, effective, bounds, scales, gained, list(tensors))
    return y


class _LowRankLinear(Function):
    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        spans: Spans,
        *tensors: Tensor,
    ) -> Tensor:
        rows, width = weight.shape
        flat = _cast(x, dtype).reshape(-1, width)
        updates = _updates(spans, tensors, dtype)
        effective = _exact(flat) and len(flat) * (width + 2 * rows) > 2 * rows * width
        if _get_current_dispatch_mode() is None:
            y = _product(flat, weight, bias, updates, effective)
        else:
            y = _opaque(flat, weight, bias, effective, spans, tensors)
        keep = y if any(span[3] for span in spans) else None
        ctx.save_for_backward(flat, weight, bias, keep, *tensors)
        ctx.dtype, ctx.spans, ctx.effective, ctx.x_like = dtype, spans, effective, (x.shape, x.dtype)
        return y

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        try:
            flat, weight, bias, y, *tensors = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error) or not any(span[3] for span in ctx.spans):
                raise
            raise Refused(
                "the backbone changes the result of a product in place, of which a gain (DoRA's) still needs the "
                "values: leave these sites out of at=, or take a method without gains (LoRA)"
            ) from error
        dtype, (shape, x_dtype) = ctx.dtype, ctx.x_like
        updates = _updates(ctx.spans, tensors, dtype)
        grad = _cast(grads[0], dtype)
        parts = [grad[:, u.start : u.stop] for u in updates]
        # The rank-r products are formed with r rows, [r, N]: skinny matrices on the left are up to ten times as fast.
        # dz = s (g ⊙ dy) B, the gradient at A x; z = A x is formed again rather than kept.
        inner = [
            (u.up if u.gain is None else u.up * u.gain[:, None]).t() @ part.t() * u.scale
            for part, u in zip(parts, updates)
        ]
        grad_x = None
        if ctx.needs_input_grad[0]:
            frozen = _cast(weight, dtype)
            if ctx.effective:
                grad_x = grad @ effective_weight(frozen, updates)
            else:
                grad_x = _gained(grad, updates) @ frozen
                for dz, u in zip(inner, updates):
                    grad_x.addmm_(dz.t(), u.down)
            grad_x = _cast(grad_x, x_dtype).view(shape)
        grad_bias = grad.sum(0).to(bias.dtype) if ctx.needs_input_grad[2] else None
        z = torch.cat([u.down for u in updates]) @ flat.t()
        grad_down = torch.cat(inner) @ flat
        ranks = [len(u.down) for u in updates]
        wide = torch.promote_types(dtype, torch.float32)
        out: list[Tensor] = []
        for u, part, z_u, down_u in zip(updates, parts, z.split(ranks), grad_down.split(ranks)):
            up_u = (z_u @ part).t() * u.scale
            out += [down_u, up_u if u.gain is None else up_u * u.gain[:, None]]
            if u.gain is not None:
                # dg = Σ dy (y - b) / g: the output is kept because its readers mostly keep it too.
                total = (part * y[:, u.start : u.stop]).sum(0, dtype=wide)
                if bias is not None:
                    total -= part.sum(0, dtype=wide) * bias[u.start : u.stop]
                out.append(torch.where(u.gain == 0, 0.0, total / u.gain))
        return grad_x, None, grad_bias, None, None, *(_cast(g, t.dtype) for g, t in zip(out, tensors))


def _gained(grad: Tensor, updates: Sequence[Update]) -> Tensor:
    if all(u.gain is None for u in updates):
        return grad
    grad = grad.clone()
    for u in updates:
        if u.gain is not None:
            grad[:, u.start : u.stop] *= u.gain
    return grad
