"""The scaled parallel adapter of He et al."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmpeft.methods.base import register
from mmpeft.methods.shared.bottleneck import Parallel
from mmpeft.parts.branch import Scale


@register("https://arxiv.org/abs/2110.04366", "additive", mergeable=False)
@dataclass(frozen=True)
class ParallelAdapter(Parallel):
    """`y = F(x) + s U relu(D x)` with the (normalised) input `x` that the sub-layer itself sees.

    `scale` is a constant (the paper's 4) or `"scalar"` for a learned one that starts at 1. The paper uses a
    bottleneck of 512 at width 1024: `reduction=2`.
    """

    reduction: int = 2
    scale: float | Literal["scalar"] = 4.0

    def learned_scale(self) -> Scale:
        return self.scale
