"""`Delta`: an additive update of a linear or convolution, given by a factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.functional.fused import Update
from mmpeft.functional.low_rank import low_rank_row_norms, squared_row_norms
from mmpeft.functional.rows import Rows, cut_rows, put_rows, take_rows, turned
from mmpeft.hosting.host import original_class
from mmpeft.hosting.quantized import QuantizedWeight, dense
from mmpeft.hosting.unchanged import Kept
from mmpeft.parts.base import Call, Hook, HookKind, Part, cast, trainable_dtype
from mmpeft.parts.factors import Factor, Hadamard, LowRank
from mmpeft.parts.linear import call_of
from mmpeft.parts.product import Inner, WeightProduct, host_weight
from mmpeft.sites import Kind
from mmpeft.types import AnyModule

KEPT_TO = 2**20
"""Entries up to which a gained weight is kept formed between calls without gradients: 4 MiB."""


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
        if dropout and transposed and weight.dim() > 2:
            raise ConfigError(
                f"dropout={dropout} does not reach transposed convolutions, whose weight is read: set it to 0, or "
                "leave them out of at="
            )
        self.rows, self.scale, self.dropout, self.transposed, self.lookup = rows, scale, dropout, transposed, lookup
        self.factor = factor
        self.magnitude: nn.Parameter | None = None
        self._squares: Kept[Tensor] = Kept()
        self._norms: Kept[Tensor] = Kept()
        self.ready: Kept[tuple[Tensor | None, Tensor, Tensor]] = Kept()
        if magnitude:
            square = squared_row_norms(take_rows(dense(weight), rows).flatten(1))
            self.magnitude = nn.Parameter(square.sqrt().to(trainable_dtype(weight.dtype)))

    @property
    def answers(self) -> bool:
        return True

    @property
    def needs_input(self) -> bool:
        return self.dropping

    @property
    def formed(self) -> bool:
        """Whether the update must be formed to be applied."""
        return isinstance(self.factor, Hadamard) and not isinstance(self.factor, LowRank)

    @property
    def dropping(self) -> bool:
        """Whether the input of the update is dropped now."""
        return bool(self.dropout) and self.training

    def norms(self, weight: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """`‖W + s ΔW‖` of each row as W [o, ...] is now; formed again once one of the tensors has changed."""

        if torch.compiler.is_compiling() or type(self.factor) is not LowRank or not all(t.is_leaf for t in stored):
            return self._norms_now(weight, None)
        return self._norms.get((*stored, *self.pair()), lambda: self._norms_now(weight, stored))

    @torch.no_grad()
    def _norms_now(self, weight: Tensor, stored: Sequence[Tensor] | None) -> Tensor:
        def squares() -> Tensor:
            return squared_row_norms(own)

        own = take_rows(dense(weight), self.rows).flatten(1)
        if stored is None:
            return low_rank_row_norms(own, squares(), *self.pair(), self.scale)
        with torch.inference_mode(False):  # what is kept may be needed for a backward pass later
            return low_rank_row_norms(own, self._squares.get(stored, squares), *self.pair(), self.scale)

    def gain(self, weight: Tensor, stored: Sequence[Tensor]) -> Tensor | None:
        """DoRA's `m / ‖W + s ΔW‖` for a [o, ...] weight kept in `stored`; None without a magnitude."""
        if self.magnitude is None:
            return None
        return self.magnitude / self.norms(weight, stored).to(self.magnitude.dtype)

    def steady(self, weight: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """What few inputs need while nothing changes: all of a small weight or None, the gain, and `Bᵀ`."""
        gain = self.gain(weight, (weight,))
        assert gain is not None
        small = weight.numel() <= KEPT_TO and weight.dtype in (torch.float32, torch.float64)  # 16 bits would round ΔW
        return self.on(weight) if small else None, gain, self.pair()[1].t()

    def pair(self) -> tuple[Tensor, Tensor]:
        """`A` and `B` of a low-rank factor."""
        assert isinstance(self.factor, LowRank)
        return self.factor.pair()

    def owned(self, reading: WeightProduct) -> tuple[Rows | None, slice | None] | None:
        """Where its rows lie in what comes out, and which of them; None for none of them."""
        if not reading.partial:
            return self.rows, None
        rows = self.rows or (0, len(reading.weight))
        assert len(rows) == 2
        return cut_rows(rows, reading.start, reading.stop)

    def update(self, reading: WeightProduct) -> Update | None:
        """The update of one range of rows; interleaved rows become the whole range, zero where not owned."""
        owned = self.owned(reading)
        if owned is None:
            return None
        (rows, piece), total = owned, len(reading.weight)
        down, up = self.pair()
        if self.rows is None and len(up) != total:
            raise ConfigError(
                f"the weight has {total} rows now, and the tuning was made for {len(up)}: resize before attach, or "
                "detach() first and attach again"
            )
        gain = self.gain(reading.weight, reading.stored)
        if piece is not None:
            up, gain = up[piece], gain if gain is None else gain[piece]
        if rows is not None and len(rows) == 2:
            return Update(*rows, self.scale, down, up, gain)
        up = put_rows(up.new_zeros(total, up.shape[1]), up, rows)
        if gain is not None:
            gain = put_rows(gain.new_ones(total), gain, rows)
        return Update(0, total, self.scale, down, up, gain)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        """The effective weight, in the base's type and layout."""
        return turned(self.on(turned(base), base)) if self.transposed else self.on(base)

    def on(self, weight: Tensor, stored: Tensor | None = None) -> Tensor:
        """The effective weight of a weight [o, i, ...], kept as `stored`."""
        own = take_rows(weight, self.rows)
        delta = (self.factor.materialise() * self.scale).view(own.shape)
        tuned = cast(own, delta.dtype) + delta
        gain = self.gain(weight, stored_in(weight if stored is None else stored))
        if gain is not None:
            tuned = tuned * gain.view(-1, *[1] * (own.dim() - 1))
        return put_rows(weight, cast(tuned, weight.dtype), self.rows)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add the update to an output already computed: convolutions, and rows routed one by one."""
        return self.through(self.reading(host), lambda _: y, x)

    def through(self, reading: WeightProduct, inner: Inner, x: Tensor) -> Tensor:
        """Add the update to what comes out of the product by the weight inside."""
        y, owned = inner(x), self.owned(reading)
        if owned is None:
            return y
        rows, piece = owned
        conv = reading.weight.dim() > 2
        channel = 1 if conv else -1
        delta = self.applied(reading, F.dropout(x, self.dropout) if self.dropping else x, y.dtype)
        gain = self.gain(reading.weight, reading.stored)
        if piece is not None:
            delta, gain = delta[..., piece], gain if gain is None else gain[piece]
        own = take_rows(y, rows, channel)
        if gain is None:
            tuned = torch.add(own, delta, alpha=self.scale)
        else:
            shape = [-1] + [1] * (y.dim() - 2) if conv else [-1]
            offset = 0.0 if reading.bias is None else take_rows(reading.bias, rows).view(shape)
            tuned = torch.add(own - offset, delta, alpha=self.scale) * cast(gain, y.dtype).view(shape) + offset
        return put_rows(y, tuned, rows, channel)

    def applied(self, reading: WeightProduct, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`ΔW x` as the weight itself is applied: a product, a convolution, a lookup."""
        weight, apply = reading.weight, reading.apply
        if not self.lookup and weight.dim() == 2:
            found: Tensor = self.factor(cast(x, dtype))
            return found
        assert apply is not None
        if not isinstance(self.factor, LowRank) or reading.groups > 1:
            return apply(x, cast(self.factor.materialise(), dtype).view(-1, *weight.shape[1:]))
        down, up = (cast(tensor, dtype) for tensor in self.pair())
        if self.lookup:
            return F.linear(apply(x, down.t()), up)
        inner = apply(x, down.view(-1, *weight.shape[1:]))
        return F.linear(inner.movedim(1, -1), up).movedim(-1, 1)

    def reading(self, host: nn.Module) -> WeightProduct:
        """The product that a host's own forward makes."""
        base = host_weight(host)
        weight = turned(base) if self.transposed else base
        layer: AnyModule = host
        bias: Tensor | None = None if self.lookup else layer.bias
        groups = int(getattr(host, "groups", 1))

        def apply(x: Tensor, kernel: Tensor) -> Tensor:
            found: Tensor = _lookup(host, x, kernel) if self.lookup else layer._conv_forward(x, kernel, None)
            return found

        return WeightProduct(weight, bias, stored_in(base), 0, len(weight), apply, groups)

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        name = hook.name or "weight"
        weight = params[name]
        assert weight is not None
        params[name] = self.read(host, name, weight)

    @classmethod
    def combine(cls, parts: Sequence[Delta], host: nn.Module, read: Sequence[str]) -> Call:
        return call_of(parts, host, read)


def hook_kind(kind: Kind, factor: Factor) -> HookKind:
    """How an update enters at a site: in place of the host's call where one pass of the input is enough.

    Low-rank products fuse with a linear's call, and what must be formed is added to the weight; Kronecker factors on a
    linear, and low-rank ones on a convolution, cost little beside the host's own output.
    """
    if isinstance(factor, LowRank):
        return "call" if kind == "linear" else "exit"
    return "call" if kind == "conv" or isinstance(factor, Hadamard) else "exit"


def stored_in(weight: Tensor) -> tuple[Tensor, ...]:
    """The tensors that tell whether a weight has changed."""
    return weight.stored() if isinstance(weight, QuantizedWeight) else (weight,)


def _lookup(host: nn.Module, x: Tensor, table: Tensor) -> Tensor:
    """What an embedding makes of another table [words, r], its own scaling (Gemma) included."""
    cls: AnyModule = original_class(host)
    stored = host._parameters["weight"]
    assert stored is not None
    if len(table) != len(stored):
        raise ConfigError(
            f"this {cls.__name__} has {len(stored)} rows, and the tuning was made for "
            f"{len(table)}: resize embeddings before attach, or detach() first and attach again"
        )
    if torch.compiler.is_compiling():  # which takes no module that is made while it traces
        host._parameters["weight"] = table  # type: ignore[assignment]  # a tensor passes for a parameter there
        try:
            found: Tensor = cls.forward(host, x)
        finally:
            host._parameters["weight"] = stored
        return found
    twin = cls.__new__(cls)  # another module over the same attributes: threads may run the host meanwhile
    twin.__dict__.update(host.__dict__, _parameters={**host._parameters, "weight": table})
    other: Tensor = cls.forward(twin, x)
    return other
