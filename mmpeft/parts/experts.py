"""Parts on a stack of weights [experts, o, i] that the backbone reads: an update or a vector for each expert."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.functional.low_rank import low_rank_row_norms, squared_row_norms
from mmpeft.functional.rows import Rows, count_rows, put_rows, take_rows
from mmpeft.parts.base import Part, cast, trainable_dtype
from mmpeft.parts.delta import Delta
from mmpeft.parts.factors import LowRank, like_options
from mmpeft.parts.product import Inner, StackReading
from mmpeft.parts.rescale import Rescale


class ExpertsDelta(Part):
    """`W_e ← g_e ⊙ (W_e + s B_e A_e)` on rows `rows` of every expert, with `g_e = m_e / ‖W_e + s B_e A_e‖` (DoRA) or 1.

    `A` is [experts, r, i] and `B` [experts, o, r], or [r, i] and [o, r] where all experts share one update; they start
    as those of `LowRank`. The input of the update alone goes through dropout where code multiplies by the stack or by
    the matrix of an expert; a weight whose values are read has the whole update.
    """

    order = 3
    scalable = True

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        rows: Rows | None = None,
        dropout: float = 0.0,
        magnitude: bool = False,
        transposed: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.scale, self.dropout, self.transposed = rows, scale, dropout, transposed
        stack, options = () if shared else (len(weight),), like_options(weight)
        columns = weight.shape[-1]
        bound = 1 / math.sqrt(columns)  # Kaiming-uniform with a = √5
        self.A = nn.Parameter(torch.empty(*stack, rank, columns, **options).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(*stack, count_rows(rows, weight.shape[-2]), rank, **options))
        self.magnitude: nn.Parameter | None = None
        if magnitude:
            square = squared_row_norms(take_rows(weight, rows, -2))
            self.magnitude = nn.Parameter(square.sqrt().to(trainable_dtype(weight.dtype)))

    @property
    def stacked(self) -> bool:
        return True

    @property
    def answers(self) -> bool:
        return True

    @property
    def needs_input(self) -> bool:
        return self.dropping

    @property
    def dropping(self) -> bool:
        """Whether the input of the update is dropped now."""
        return bool(self.dropout) and self.training

    @property
    def shared(self) -> bool:
        """Whether all experts have one update."""
        return self.A.dim() == 2

    def one(self, expert: int) -> Delta:
        return _OneDelta(self, expert)

    def gain(self, weight: Tensor) -> Tensor | None:
        """DoRA's gain for each expert and row of a stack [experts, o, i]; None without a magnitude."""
        if self.magnitude is None:
            return None
        own = take_rows(weight, self.rows, -2)
        norms = low_rank_row_norms(own, squared_row_norms(own), self.A, self.B, self.scale)
        return self.magnitude / norms.to(self.magnitude.dtype)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        weight = base.mT if self.transposed else base
        own = take_rows(weight, self.rows, -2)
        delta = self.B @ self.A
        tuned = torch.add(cast(own, delta.dtype), delta, alpha=self.scale)
        gain = self.gain(weight)
        if gain is not None:
            tuned = tuned * gain.unsqueeze(-1)
        whole = put_rows(weight, cast(tuned, weight.dtype), self.rows, -2)
        return whole.mT if self.transposed else whole

    def through_stack(self, reading: StackReading, inner: Inner, x: Tensor) -> Tensor:
        y, channel = inner(x), reading.channel
        dropped = F.dropout(x, self.dropout) if self.dropping else x
        delta = reading.apply(reading.apply(cast(dropped, y.dtype), self.A), self.B)
        tuned = torch.add(take_rows(y, self.rows, channel), delta, alpha=self.scale)
        gain = self.gain(reading.weight)
        if gain is not None:
            tuned = tuned * reading.spread(cast(gain, y.dtype))
        return put_rows(y, tuned, self.rows, channel)


class _Pair(LowRank):
    """The pair of one expert."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        nn.Module.__init__(self)
        self.down, self.up = down, up

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up


class _OneDelta(Delta):
    """The update of one expert's matrix; it owns nothing."""

    def __init__(self, whole: ExpertsDelta, expert: int) -> None:
        nn.Module.__init__(self)
        down, up = (whole.A, whole.B) if whole.shared else (whole.A[expert], whole.B[expert])
        self.rows, self.scale, self.dropout, self.transposed = whole.rows, whole.scale, whole.dropout, whole.transposed
        self.lookup, self.training, self.factor = False, whole.training, _Pair(down, up)
        self.length = None if whole.magnitude is None else whole.magnitude[expert]

    def tensors(self) -> Iterable[Tensor]:
        return [t for t in (*self.pair(), self.length) if t is not None]

    def gain(self, weight: Tensor, stored: Sequence[Tensor]) -> Tensor | None:
        if self.length is None:
            return None
        own = take_rows(weight.detach(), self.rows)
        norms = low_rank_row_norms(own, squared_row_norms(own), *self.pair(), self.scale)
        return self.length / norms.to(self.length.dtype)


class ExpertsRescale(Part):
    """`y_e ← γ_e ⊙ y_e` on rows `rows` of what comes out of every expert's matrix, or `x_e ← γ_e ⊙ x_e` on its input.

    What an expert adds to its rows, its own of `bias_owner` [experts, o], is scaled as well.
    """

    order = 2
    scalable = True

    def __init__(
        self,
        weight: Tensor,
        side: Literal["output", "input"],
        rows: Rows | None = None,
        bias_owner: str = "",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.side, self.bias_name, self.transposed = side, bias_owner, transposed
        self.rows = rows if side == "output" else None
        size = weight.shape[-1] if side == "input" else count_rows(rows, weight.shape[-2])
        self.gamma = nn.Parameter(torch.ones(len(weight), size, **like_options(weight)))

    @property
    def stacked(self) -> bool:
        return True

    @property
    def answers(self) -> bool:
        return True

    def one(self, expert: int) -> Rescale:
        return _OneRescale(self, expert)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        gamma = cast(self.gamma, base.dtype)
        if name == self.bias_name:
            return put_rows(base, take_rows(base, self.rows, -1) * gamma, self.rows, -1)
        weight = base.mT if self.transposed else base
        if self.side == "input":
            whole = weight * gamma.unsqueeze(-2)
        else:
            whole = put_rows(weight, take_rows(weight, self.rows, -2) * gamma.unsqueeze(-1), self.rows, -2)
        return whole.mT if self.transposed else whole

    def through_stack(self, reading: StackReading, inner: Inner, x: Tensor) -> Tensor:
        if self.side == "input":
            return inner(x * reading.spread(cast(self.gamma, x.dtype)))
        y, channel = inner(x), reading.channel
        own = take_rows(y, self.rows, channel) * reading.spread(cast(self.gamma, y.dtype))
        return put_rows(y, own, self.rows, channel)


class _OneRescale(Rescale):
    """The vector of one expert; it owns nothing."""

    def __init__(self, whole: ExpertsRescale, expert: int) -> None:
        nn.Module.__init__(self)
        self.rows, self.transposed, self.side, self.channel_dim = whole.rows, whole.transposed, whole.side, -1
        self.bias_name, self.beta = "", None
        own: Any = whole.gamma[expert]
        self.gamma = own

    def tensors(self) -> Iterable[Tensor]:
        return [self.gamma]
