"""UniPELT: LoRA, prefix and adapter, each behind gates."""

from __future__ import annotations

from dataclasses import dataclass

from mmpeft.methods.additive.pfeiffer import Pfeiffer
from mmpeft.methods.additive.prefix_tuning import PrefixTuning
from mmpeft.methods.base import Method, register
from mmpeft.methods.gated import Gated
from mmpeft.methods.reparameterized.lora import LoRA
from mmpeft.methods.shared.recipe import Recipe
from mmpeft.sites import Selector


@register("https://arxiv.org/abs/2110.07577", "hybrid", mergeable=False, identity=False)
@dataclass(frozen=True)
class UniPELT(Recipe):
    """`gate(LoRA)` by the token, `gate(PrefixTuning)` and `gate(Pfeiffer)` by its mean over tokens; g = σ(w·x + b).

    LoRA: `W x + g(x) s B A x`. Adapter: `h + ḡ(h) U relu(D h)`. Prefix: its share λ of the attention becomes `ḡ(x) λ`;
    the published code scales keys and values instead, which never turns a prefix off. Where attention is causal, all
    gates are by the token. `at` says where LoRA acts. Parameters: those of the three, and `d + 1` a part.
    """

    at: Selector = "attn.{q,v}"
    rank: int = 8
    alpha: float = 2.0
    tokens: int = 10
    bottleneck: int | None = None
    reduction: int = 16

    @property
    def recipe(self) -> Method:
        return (
            Gated(LoRA(at=self.at, rank=self.rank, alpha=self.alpha), "token")
            + Gated(PrefixTuning(tokens=self.tokens, hidden=self.hidden), "pooled")
            + Gated(Pfeiffer(bottleneck=self.bottleneck, reduction=self.reduction), "pooled")
        )
