"""SoRA: rank components with gates that a proximal step closes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmpeft.controllers import Controller
from mmpeft.controllers.rank import GateSparsity
from mmpeft.methods.base import register
from mmpeft.methods.shared.low_rank import PrunedLoRA
from mmpeft.parts import DiagonalLowRank, Factor


@register("https://arxiv.org/abs/2311.11696", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class SoRA(PrunedLoRA):
    """`ΔW = (α/r) B diag(g) A`, g ~ N(0, 1), with `λ ‖g‖₁ / n` in the loss and g soft-thresholded by ξ at every step.

    `schedule` lets ξ grow linearly from 0. The saved adapter is a LoRA without the closed components; give the gates a
    constant learning rate, or late training shrinks them too much. Parameters: `r (i + o + 1)` a site.
    """

    sparsity: float = 1e-3
    threshold: float = 3e-4
    schedule: bool = False

    def factor(self, rows: int, columns: int, rank: int, like: Tensor, lookup: bool) -> Factor:
        return DiagonalLowRank(rows, columns, rank, like, "normal")

    def drive(self, factors: list[DiagonalLowRank]) -> list[Controller]:
        return [GateSparsity(factors, self.sparsity, self.threshold, self.schedule)]
