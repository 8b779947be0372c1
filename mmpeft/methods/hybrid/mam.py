"""MAM: the mix-and-match adapter of He et al."""

from __future__ import annotations

from dataclasses import dataclass

from mmpeft.methods.additive.parallel_adapter import ParallelAdapter
from mmpeft.methods.additive.prefix_tuning import PrefixTuning
from mmpeft.methods.base import Method, register
from mmpeft.methods.shared.recipe import Recipe


@register("https://arxiv.org/abs/2110.04366", "hybrid", mergeable=False, identity=False)
@dataclass(frozen=True)
class MAM(Recipe):
    """`PrefixTuning(tokens, hidden) + ParallelAdapter(bottleneck, scale)`: prefixes in attention, adapters beside the
    feed-forward network. Parameters: those of the two.
    """

    tokens: int = 30
    bottleneck: int = 512
    scale: float = 4.0
    dropout: float = 0.0

    @property
    def recipe(self) -> Method:
        adapter = ParallelAdapter(bottleneck=self.bottleneck, scale=self.scale, dropout=self.dropout)
        return PrefixTuning(tokens=self.tokens, hidden=self.hidden) + adapter
