"""The serial adapter of Houlsby et al."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.methods.base import register
from mmpeft.methods.shared.bottleneck import Bottleneck
from mmpeft.parts.branch import Init
from mmpeft.sites import Selector


@register("https://arxiv.org/abs/1902.00751", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """`h ← h + U σ(D h)` behind attention and behind the feed-forward network, before the residual sums.

    Both projections start at N(0, .01²) truncated at 2σ, so the model moves by about 1e-2 at initialisation.
    """

    at: Selector = "{attn,mlp}"
    activation: str = "silu"
    init: ClassVar[Init] = "houlsby"
