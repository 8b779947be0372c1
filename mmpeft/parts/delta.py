"""`Delta`: an additive update of a linear or convolution, given by a factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.few_bits import FewBits, dense, viewed
from mmpeft.functional.fused import Update, low_rank_composed, low_rank_linear
from mmpeft.functional.low_rank import low_rank_row_norms, squared_row_norms
from mmpeft.functional.rows import Rows, put_rows, take_rows
from mmpeft.parts.base import Call, Hook, HookKind, Part, cast, trainable_dtype
from mmpeft.parts.factors import Factor, Hadamard, LowRank
from mmpeft.sites import Kind

FUSED_FROM = 32_768
"""Input elements from which the fused autograd function pays for its own call overhead."""


class Delta(Part):
    """`y = g ⊙ (W + s ΔW) x + b` on output rows `rows`, with `g = m / ‖W + s ΔW‖` (DoRA) or 1.

    The input of the update alone goes through dropout. Convolutions use the same factor on the flattened
    kernel, embeddings the factor of their transposed table, [d, words] (`lookup`). `Delta` enters through `call`
    on linears, `exit` on embeddings and ordinary convolutions, and `read` of the weight where the backbone reads
    it directly or the convolution is grouped.
    """

    order = 3
    scalable = True

    def __init__(
        self,
        weight: Tensor,
        factor: Factor,
        scale: float,
        rows: Rows | None = None,
        dropout: float = 0.0,
        magnitude: bool = False,
        transposed: bool = False,
        lookup: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.scale, self.dropout, self.transposed, self.lookup = rows, scale, dropout, transposed, lookup
        self.factor = factor
        self.magnitude: nn.Parameter | None = None
        if magnitude:
            square = squared_row_norms(take_rows(dense(weight), rows).flatten(1))
            self.register_buffer("weight_sq", square, persistent=False)
            self.magnitude = nn.Parameter(square.sqrt().to(trainable_dtype(weight.dtype)))

    def gain(self, weight: Tensor) -> Tensor | None:
        """DoRA's `m / ‖W + s ΔW‖` for a [o, ...] weight; None without a magnitude."""
        if self.magnitude is None:
            return None
        own = take_rows(dense(weight), self.rows).flatten(1)
        square: Tensor = self.weight_sq  # type: ignore[assignment]
        norm = low_rank_row_norms(own, square, *self.pair(), self.scale)
        return self.magnitude / norm.to(self.magnitude.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """`A` and `B` of a low-rank factor."""
        assert isinstance(self.factor, LowRank)
        return self.factor.pair()

    def update(self, weight: Tensor) -> Update:
        """The update of one range of rows; interleaved rows become the whole range, zero where not owned."""
        down, up = self.pair()
        gain = self.gain(weight)
        if self.rows is not None and len(self.rows) == 2:
            return Update(*self.rows, self.scale, down, up, gain)
        up = put_rows(up.new_zeros(len(weight), up.shape[1]), up, self.rows)
        if gain is not None:
            gain = put_rows(gain.new_ones(len(weight)), gain, self.rows)
        return Update(0, len(weight), self.scale, down, up, gain)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        """The effective weight, in the base's type and layout."""
        weight = base.t() if self.transposed else base
        own = take_rows(weight, self.rows)
        delta = (self.factor.materialise() * self.scale).view(own.shape)
        tuned = cast(own, delta.dtype) + delta
        gain = self.gain(weight)
        if gain is not None:
            tuned = tuned * gain.view(-1, *[1] * (own.dim() - 1))
        whole = put_rows(weight, cast(tuned, base.dtype), self.rows)
        return whole.t() if self.transposed else whole

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add the update to an output already computed: convolutions, and rows routed one by one."""
        weight = self.weight_of(host)
        bias: Tensor | None = None if self.lookup else host.bias  # type: ignore[assignment]
        conv = weight.dim() > 2
        channel = 1 if conv else -1
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        delta = self.applied(host, x, y.dtype, weight)
        own = take_rows(y, self.rows, channel)
        gain = self.gain(weight)
        if gain is None:
            tuned = torch.add(own, delta, alpha=self.scale)
        else:
            shape = [-1] + [1] * (y.dim() - 2) if conv else [-1]
            offset = 0.0 if bias is None else take_rows(bias, self.rows).view(shape)
            tuned = torch.add(own - offset, delta, alpha=self.scale) * cast(gain, y.dtype).view(shape) + offset
        return put_rows(y, tuned, self.rows, channel)

    def applied(self, host: nn.Module, x: Tensor, dtype: torch.dtype, weight: Tensor) -> Tensor:
        """`ΔW x` as the host applies its own weight: a product, a convolution, a lookup."""
        if not self.lookup and weight.dim() == 2:
            found: Tensor = self.factor(cast(x, dtype))
            return found
        if not isinstance(self.factor, LowRank):
            kernel = cast(self.factor.materialise(), dtype).view(-1, *weight.shape[1:])
            return host._conv_forward(x, kernel, None)  # type: ignore[operator, no-any-return]
        down, up = (cast(tensor, dtype) for tensor in self.pair())
        if self.lookup:
            return F.linear(_lookup(host, x, down.t()), up)
        inner = host._conv_forward(x, down.view(-1, *weight.shape[1:]), None)  # type: ignore[operator]
        return F.linear(inner.movedim(1, -1), up).movedim(-1, 1)

    def weight_of(self, host: nn.Module) -> Tensor:
        """The host's weight as [o, i, ...]."""
        weight = _read(host)
        return weight.t() if self.transposed else weight

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        name = hook.name or "weight"
        weight = params[name]
        assert weight is not None
        params[name] = self.read(host, name, weight)

    @classmethod
    def combine(cls, parts: Sequence[Delta], host: nn.Module, read: Sequence[str]) -> Call:
        if not all(isinstance(part.factor, LowRank) for part in parts):
            return _FormedCall(tuple(parts))
        only = parts[0]
        plain = only.rows is None and only.magnitude is None and not (only.dropout or only.transposed)
        plain = plain and type(only.factor) is LowRank
        if len(parts) == 1 and plain and not read and not type(host).packed:  # type: ignore[attr-defined]
            return _WholeCall(only)
        return _RowsCall(tuple(parts))


def hook_kind(kind: Kind, factor: Factor) -> HookKind:
    """How an update enters at a site: in place of the host's call where one pass of the input is enough.

    Low-rank products fuse with a linear's call, and what must be formed is added to the weight; Kronecker factors on a
    linear, and low-rank ones on a convolution, cost little beside the host's own output.
    """
    if isinstance(factor, LowRank):
        return "call" if kind == "linear" else "exit"
    return "call" if kind == "conv" or isinstance(factor, Hadamard) else "exit"


def _read(host: nn.Module) -> Tensor:
    """The weight that a host multiplies by, whatever parts read it."""
    weight: Tensor = host.weight  # type: ignore[assignment]
    found: Tensor = viewed(host, weight) if getattr(type(host), "packed", False) else weight
    return found


def _lookup(host: nn.Module, x: Tensor, table: Tensor) -> Tensor:
    """What an embedding makes of another table [words, r], its own scaling (Gemma) included."""
    own = host._parameters["weight"]
    host._parameters["weight"] = table  # type: ignore[assignment]
    try:
        found: Tensor = type(host).base.forward(host, x)  # type: ignore[attr-defined]
    finally:
        host._parameters["weight"] = own
    return found


class _WholeCall:
    """The forward of a linear with one plain update of all its rows: the common case, kept short.

    Looks parameters up in the modules' own tables: `nn.Module.__getattr__` costs more than a small product.
    """

    def __init__(self, delta: Delta) -> None:
        factor = delta.factor._parameters
        assert factor["B"] is not None
        self.scale, self.factor, self.rows = delta.scale, factor, len(factor["B"])

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        own, factor = host._parameters, self.factor
        weight, bias, down, up = own["weight"], own["bias"], factor["A"], factor["B"]
        assert weight is not None
        assert down is not None
        assert up is not None
        if fusible(x, weight):
            return low_rank_linear(x, weight, bias, (Update(0, self.rows, self.scale, down, up),))
        down_x, up_x = cast(down, x.dtype), cast(up, x.dtype)
        return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, down_x), up_x), alpha=self.scale)


class _FormedCall:
    """The forward with updates that are formed: added to the weight, for one pass of the input and not two.

    A weight held in few bits has no sum: there the updates are added to the output.
    """

    def __init__(self, deltas: tuple[Delta, ...]) -> None:
        self.deltas = deltas

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        weight = _read(host)
        bias: Tensor | None = host.bias  # type: ignore[assignment]
        if type(weight) not in (Tensor, nn.Parameter) or any(d.dropout and d.training for d in self.deltas):
            packed = isinstance(weight, FewBits)
            y: Tensor = F.linear(x, weight, bias) if packed else type(host).base.forward(host, x)  # type: ignore
            for delta in self.deltas:
                y = delta.exit(host, x, y)
            return y
        for delta in self.deltas:
            weight = delta.read(host, "weight", weight)
        if weight.dim() > 2:
            return host._conv_forward(x, weight, bias)  # type: ignore[operator, no-any-return]
        return F.linear(x, weight.t() if self.deltas[0].transposed else weight, bias)


class _RowsCall:
    """The forward of a linear with updates of its rows: fused where it pays and applies, composed elsewhere."""

    def __init__(self, deltas: tuple[Delta, ...]) -> None:
        self.deltas = deltas
        self.dropout = any(delta.dropout for delta in deltas)
        interleaved = any(delta.rows is not None and len(delta.rows) == 3 for delta in deltas)
        self.overlap = interleaved and any(delta.magnitude is not None for delta in deltas)
        """Whether gains of several updates meet in one row, which the fused function takes to be disjoint."""

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        weight: Tensor = self.deltas[0].weight_of(host)
        bias: Tensor | None = host.bias  # type: ignore[assignment]
        updates = [delta.update(weight) for delta in self.deltas]
        drop = self.dropout and self.deltas[0].training
        if not (drop or self.overlap) and fusible(x, weight):
            return low_rank_linear(x, weight, bias, updates)
        rates = [delta.dropout for delta in self.deltas] if drop else ()
        return low_rank_composed(x, weight, bias, updates, rates)


def fusible(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused function is exact here and pays: eager, and a plain frozen floating-point weight."""
    return (
        not torch.compiler.is_compiling()  # asked first: a size that is compared is a size that is fixed
        and not torch._C._is_tracing()
        and x.numel() >= FUSED_FROM
        and not weight.requires_grad
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not torch._C._are_functorch_transforms_active()
    )
