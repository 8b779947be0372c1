"""LoHa: the Hadamard product of two low-rank updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmpeft.methods.base import register
from mmpeft.methods.reparameterized.lora import LoRA
from mmpeft.parts import Factor, Hadamard, KhatriRao
from mmpeft.sites import Kind


@register("https://arxiv.org/abs/2309.14859", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class LoHa(LoRA):
    """`y = W x + b + s ((B₁ A₁) ⊙ (B₂ A₂)) drop(x)`, `s = α/r`: rank up to r² for twice the parameters of LoRA's r.

    `A` ~ N(0, 1), `B₁` ~ N(0, .1²), `B₂` zero. While r² is at most a quarter of the smaller side of the weight the
    update runs as the low-rank product that it equals, `(B₁ ∗ B₂)(A₁ ∗ A₂)` with Khatri–Rao products, and the matrix
    is never formed. Parameters: `2 r (i + o)` a site. The form is FedPara's (arXiv:2108.06098).
    """

    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv")
    matrices: ClassVar[int] = 2

    def factor(self, rows: int, columns: int, rank: int, like: Tensor, lookup: bool) -> Factor:
        kind = KhatriRao if 4 * rank**2 <= min(rows, columns) else Hadamard
        return kind(rows, columns, rank, like)
