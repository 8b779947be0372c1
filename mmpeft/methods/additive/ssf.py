"""SSF: scale and shift every operation's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmpeft.methods.base import SiteMethod, register
from mmpeft.methods.recipe import any_tensor, fan, own_weight, positive
from mmpeft.methods.shared.rescaling import place_rescale
from mmpeft.parts import Rescale
from mmpeft.parts.base import Placement
from mmpeft.sites import Kind, Selector, Site


@register("https://arxiv.org/abs/2210.08823", "additive", mergeable=True, identity=False)
@dataclass(frozen=True)
class SSF(SiteMethod):
    """`y ← γ ⊙ y + β` behind patch embedding, norms and linears; γ ~ N(1, .02²), β ~ N(0, .02²).

    Folds exactly into the layers it follows. Parameters: `2 c` a site of `c` channels.
    """

    at: Selector = "{embed,norm,attn.*,cross.*,mlp.*,conv}"
    std: float = 0.02
    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "norm")

    def __post_init__(self) -> None:
        positive(self, std=self.std)

    def build(self, model: nn.Module, site: Site) -> Placement:
        like = _vector(model, site) if site.kind == "norm" else own_weight(model, site)
        placement = place_rescale("ssf", model, site, like, side="output", shift=True)
        part = placement.part
        assert isinstance(part, Rescale)
        assert part.beta is not None
        nn.init.normal_(part.gamma, 1.0, self.std)
        nn.init.normal_(part.beta, 0.0, self.std)
        return placement

    def count_at(self, model: nn.Module, site: Site) -> int:
        return 2 * (site.width if site.kind == "norm" else fan(model, site)[0])


def _vector(model: nn.Module, site: Site) -> Tensor:
    return any_tensor(model, site).new_empty(site.width)
