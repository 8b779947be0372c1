"""The forward of a linear or convolution in whose place its updates are computed together with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.functional.fused import Update, low_rank_composed, low_rank_linear
from mmpeft.hosting.quantized import QuantizedWeight, dense
from mmpeft.parts.base import Call, cast
from mmpeft.parts.factors import LowRank
from mmpeft.parts.product import FUSED_FROM, WeightProduct, fusible, host_weight, like
from mmpeft.types import AnyModule

if TYPE_CHECKING:
    from mmpeft.parts.delta import Delta


def call_of(parts: Sequence[Delta], host: nn.Module, read: Sequence[str]) -> Call:
    """One callable for all updates of a host; `read` lists its attributes that other parts answer for."""
    if not all(isinstance(part.factor, LowRank) for part in parts):
        return _FormedCall(tuple(parts))
    only = parts[0]
    plain = only.rows is None and not (only.dropout or only.transposed) and type(only.factor) is LowRank
    tuned: AnyModule = type(host)
    if len(parts) == 1 and plain and not read and not tuned.mmpeft_packed:
        return _WholeCall(only) if only.magnitude is None else _GainedCall(only)
    return _RowsCall(tuple(parts))


class _WholeCall:
    """The forward of a linear with one plain update of all its rows: the common case, kept short.

    Looks parameters up in the modules' own tables: `nn.Module.__getattr__` costs more than a small product.
    """

    def __init__(self, delta: Delta) -> None:
        factor = delta.factor._parameters
        assert factor["B"] is not None
        self.delta, self.scale, self.factor, self.rows = delta, delta.scale, factor, len(factor["B"])

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        own, factor = host._parameters, self.factor
        weight, bias, down, up = own.get("weight"), own.get("bias"), factor["A"], factor["B"]
        if weight is None or weight.shape[0] != self.rows:
            # computed by somebody who came later (parametrisations, weight norm, pruning), or of another size
            return multiply((self.delta,), self.delta.reading(host), x)
        assert down is not None
        assert up is not None
        if fusible(x, weight):
            return low_rank_linear(x, weight, bias, (Update(0, self.rows, self.scale, down, up),))
        down_x, up_x = cast(down, x.dtype), cast(up, x.dtype)
        return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, down_x), up_x), alpha=self.scale)


class _GainedCall:
    """The same with a gain. Few inputs take the short way; without gradients, all that they do not change is kept."""

    def __init__(self, delta: Delta) -> None:
        self.delta, self.factor = delta, delta.factor._parameters

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        delta, own, factor = self.delta, host._parameters, self.factor
        weight, down, up = own.get("weight"), factor["A"], factor["B"]
        assert down is not None
        if (
            weight is None  # computed by somebody who came later
            or torch.compiler.is_compiling()
            or type(weight) not in (Tensor, nn.Parameter)
            or not (x.dtype is weight.dtype is down.dtype)
            or x.numel() >= FUSED_FROM
            or torch.is_autocast_enabled(x.device.type)
            or torch._C._are_functorch_transforms_active()
        ):
            return multiply((delta,), delta.reading(host), x)
        if torch.is_grad_enabled() or not weight.is_cpu:  # nothing is kept of what is on an accelerator
            gain = delta.gain(weight, (weight,))
            assert gain is not None
            update = F.linear(F.linear(x, down), up)  # type: ignore[arg-type]  # factors are there
            y = torch.add(F.linear(x, weight), update, alpha=delta.scale) * gain
            return y if own["bias"] is None else y + own["bias"]
        tensors = (weight, down, up, delta._parameters["magnitude"])
        steady = partial(delta.steady, weight)
        whole, gain, up_t = delta.ready.get(tensors, steady)  # type: ignore[arg-type]  # all four are there
        bias = own["bias"]
        if whole is not None:
            return F.linear(x, whole, bias)
        y, z = F.linear(x, weight), F.linear(x, down)
        if x.dim() != 2:
            y.view(-1, len(gain)).addmm_(z.view(-1, len(down)), up_t, alpha=delta.scale)
        else:
            y.addmm_(z, up_t, alpha=delta.scale)
        return y.mul_(gain) if bias is None else torch.addcmul(bias, y, gain, out=y)


class _FormedCall:
    """The forward with updates that are formed: added to the weight, for one pass of the input and not two.

    A weight quantised has no sum: there the updates are added to the output.
    """

    def __init__(self, deltas: tuple[Delta, ...]) -> None:
        self.deltas = deltas

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        weight = host_weight(host)
        layer: AnyModule = host
        bias: Tensor | None = layer.bias
        if type(weight) not in (Tensor, nn.Parameter) or any(delta.dropping for delta in self.deltas):
            packed = isinstance(weight, QuantizedWeight)
            y: Tensor = F.linear(x, weight, bias) if packed else layer.mmpeft_base.forward(host, x)
            for delta in self.deltas:
                y = delta.exit(host, x, y)
            return y
        for delta in self.deltas:
            weight = delta.read(host, "weight", weight)
        if weight.dim() > 2:
            convolved: Tensor = layer._conv_forward(x, weight, bias)
            return convolved
        return F.linear(x, weight.t() if self.deltas[0].transposed else weight, bias)


class _RowsCall:
    """The forward of a linear with updates of its rows."""

    def __init__(self, deltas: tuple[Delta, ...]) -> None:
        self.deltas = deltas

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        return multiply(self.deltas, self.deltas[0].reading(host), x)


def multiply(deltas: Sequence[Delta], reading: WeightProduct, x: Tensor) -> Tensor:
    """`x` by a weight with low-rank updates of its rows: fused where it pays and applies, composed elsewhere."""
    drop = any(delta.dropping for delta in deltas)
    updates, rates = [], []
    for delta in deltas:
        update = delta.update(reading)
        if update is not None:
            updates.append(update)
            rates.append(delta.dropout if drop else 0.0)
    weight = reading.weight[reading.start : reading.stop] if reading.partial else reading.weight
    if not updates:
        return F.linear(x, like(weight, x), reading.bias)
    if _overlap(updates):
        if not any(len(delta.rows or ()) == 3 for delta in deltas):
            whole = dense(reading.weight)
            for delta in deltas:  # a gain is that of what lies within it
                whole = delta.on(whole)
            return F.linear(x, like(whole[reading.start : reading.stop], x), reading.bias)
    elif not drop and fusible(x, weight):
        return low_rank_linear(x, weight, reading.bias, updates)
    return low_rank_composed(x, like(weight, x), reading.bias, updates, rates if drop else ())


def _overlap(updates: Sequence[Update]) -> bool:
    """Whether gains meet other updates in one row, which the fused function takes to be disjoint."""
    if len(updates) == 1 or all(update.gain is None for update in updates):
        return False
    ranges = sorted(update[:2] for update in updates)
    return any(before[1] > after[0] for before, after in pairwise(ranges))
