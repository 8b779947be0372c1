"""AdaLoRA: a budget of rank components, spent where they matter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmpeft.controllers import Controller
from mmpeft.controllers.rank import RankAllocation
from mmpeft.errors import ConfigError
from mmpeft.methods.base import register
from mmpeft.methods.recipe import positive, rate
from mmpeft.methods.shared.low_rank import PrunedLoRA
from mmpeft.parts import DiagonalLowRank, Factor


@register("https://arxiv.org/abs/2303.10512", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class AdaLoRA(PrunedLoRA):
    """`ΔW = (α/r) B diag(g) A`, g starting at 0; the components of all sites compete for `target` ones a site.

    Of the run, `warmup` trains all of them, then a cubic takes the worst away every `every` steps, and the last
    `settle` trains what is left. The saved adapter is a LoRA with a rank for each site. Parameters: `r (i + o + 1)`
    a site.
    """

    rank: int = 12
    alpha: float = 12.0
    target: int = 8
    warmup: float = 0.1
    settle: float = 0.3
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, target=self.target, every=self.every)
        rate(self, warmup=self.warmup, settle=self.settle, beta1=self.beta1, beta2=self.beta2)
        if self.target > self.rank:
            raise ConfigError(f"AdaLoRA: target={self.target} is above rank={self.rank}, the rank to start from")
        if self.warmup + self.settle >= 1:
            raise ConfigError(f"AdaLoRA: warmup={self.warmup} and settle={self.settle} leave no steps to prune in")

    def factor(self, rows: int, columns: int, rank: int, like: Tensor, lookup: bool) -> Factor:
        return DiagonalLowRank(rows, columns, rank, like, "zero")

    def drive(self, factors: list[DiagonalLowRank]) -> list[Controller]:
        return [
            RankAllocation(
                factors,
                self.target,
                warmup=self.warmup,
                settle=self.settle,
                every=self.every,
                beta1=self.beta1,
                beta2=self.beta2,
                gamma=self.gamma,
            )
        ]
