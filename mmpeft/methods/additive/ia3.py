"""(IA)³: learned vectors on keys, values and the inner activation of the feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mmpeft.methods.base import PRODUCTS, SiteMethod, register
from mmpeft.methods.recipe import fan, own_weight
from mmpeft.methods.shared.rescaling import place_rescale
from mmpeft.parts.base import Placement
from mmpeft.sites import Kind, Selector, Site


@register("https://arxiv.org/abs/2205.05638", "additive", mergeable=True)
@dataclass(frozen=True)
class IA3(SiteMethod):
    """`K ← l_k ⊙ K`, `V ← l_v ⊙ V`, `inner ← l_ff ⊙ inner`, all vectors starting at 1.

    `l_ff` acts on the input of `mlp.down` and `expert.down`, where each expert has its own; `side` has every vector of
    the method act on the input or the output. Weight decay must be off: it pulls the vectors to 0, not to 1.
    """

    at: Selector = "{attn.k,attn.v,cross.k,cross.v,mlp.down,expert.down}"
    takes: ClassVar[tuple[Kind, ...]] = ("linear", "experts")
    elsewhere: ClassVar[tuple[str, ...]] = PRODUCTS
    inner: ClassVar[tuple[str, ...]] = ("mlp.down", "expert.down")
    """Roles whose input is scaled, not the output, unless `side` says more."""
    side: Literal["", "input", "output"] = ""

    def scales_input(self, site: Site) -> bool:
        """Whether the vector at a site acts on what goes in."""
        return self.side == "input" if self.side else site.role in self.inner

    def build(self, model: nn.Module, site: Site) -> Placement:
        side: Literal["input", "output"] = "input" if self.scales_input(site) else "output"
        return place_rescale("ia3", model, site, own_weight(model, site), side=side, shift=False)

    def count_at(self, model: nn.Module, site: Site) -> int:
        rows, columns = fan(model, site)
        experts = len(own_weight(model, site)) if site.kind == "experts" else 1
        return experts * (columns if self.scales_input(site) else rows)
