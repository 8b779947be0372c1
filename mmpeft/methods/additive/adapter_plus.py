"""Adapter+: a post-adapter with channel-wise scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.methods.base import register
from mmpeft.methods.recipe import rate
from mmpeft.methods.shared.bottleneck import Bottleneck
from mmpeft.parts.branch import Init, Scale
from mmpeft.sites import Selector


@register("https://arxiv.org/abs/2406.06820", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class AdapterPlus(Bottleneck):
    """`h ← h + γ ⊙ droppath(U gelu(D h))` behind the whole block; γ [d] starts at 1, Houlsby init, size 8."""

    at: Selector = "block"
    bottleneck: int | None = 8
    activation: str = "gelu"
    drop_path: float = 0.1
    init: ClassVar[Init] = "houlsby"

    def __post_init__(self) -> None:
        super().__post_init__()
        rate(self, drop_path=self.drop_path)

    def learned_scale(self) -> Scale:
        return "channel"

    def drop_path_rate(self) -> float:
        return self.drop_path
