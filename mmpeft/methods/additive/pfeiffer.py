"""The serial adapter of Pfeiffer et al."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.methods.base import register
from mmpeft.methods.shared.bottleneck import Bottleneck
from mmpeft.parts.branch import Init
from mmpeft.sites import Selector


@register("https://arxiv.org/abs/2005.00247", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """`h ← h + U relu(D h)` behind the feed-forward network alone; both projections start at N(0, .02²)."""

    at: Selector = "mlp"
    init: ClassVar[Init] = "bert"
