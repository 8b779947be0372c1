"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.functional.kron import balanced_factor
from mmpeft.methods.base import register
from mmpeft.methods.recipe import own_weight, positive, rate
from mmpeft.methods.shared.kronecker import Kronecker, place_kron
from mmpeft.parts import Factor, Kron, LowRankKron
from mmpeft.parts.base import Placement
from mmpeft.sites import Kind, Selector, Site

Shape = tuple[int, int]


@register("https://arxiv.org/abs/2309.14859", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class LoKr(Kronecker):
    """`y = W x + b + s (L ⊗ (B A)) drop(x)`, `s = α/r`; L [a, c] Kaiming-uniform, A [r, d] too, B [b, r] zero.

    Where r is not below half of b and d the second factor is whole, [b, d], and `s = 1`: that is `KronA`. Kernels are
    split by their channels, as LyCORIS splits them. `left` is (a, c), by default the divisors of the output and input
    channels nearest to their square roots from below. Never formed in a call. Parameters: `a c + r (b + d)` a site.
    """

    at: Selector = "attn.{q,v}"
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0

    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, rank=self.rank, alpha=self.alpha)
        rate(self, dropout=self.dropout)

    def split(self, model: nn.Module, site: Site) -> tuple[Shape, Shape, bool]:
        """Shapes of the two factors, and whether the second is whole."""
        rows, columns = self.size(model, site)
        inputs = own_weight(model, site).shape[1]
        default = (balanced_factor(rows), balanced_factor(inputs))
        left, right = self.shapes(site, rows, columns, default)
        channels = right[1] * inputs // columns
        return left, right, 2 * self.rank >= max(right[0], channels)

    def build(self, model: nn.Module, site: Site) -> Placement:
        left, right, whole = self.split(model, site)
        weight = own_weight(model, site)
        factor: Factor = Kron(left, right, weight) if whole else LowRankKron(left, right, self.rank, weight)
        scale = 1.0 if whole else self.alpha / self.rank
        return place_kron(self, "lokr", model, site, factor, scale, self.dropout)

    def count_at(self, model: nn.Module, site: Site) -> int:
        (a, c), (b, d), whole = self.split(model, site)
        return a * c + (b * d if whole else self.rank * (b + d))
