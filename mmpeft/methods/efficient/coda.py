"""CoDA: conditional adapters, where most tokens skip the frozen block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.methods.base import Sited, register
from mmpeft.methods.needs import Refusal, at_site
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.recipe import any_tensor, positive
from mmpeft.parts import Branch
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.conditional import Conditional
from mmpeft.sites import Selector, Site


@register("https://arxiv.org/abs/2304.04947", "efficient", mergeable=False, identity=False)
@dataclass(frozen=True)
class CoDA(Sited):
    """`y = x + A(x) + scatter_I(λ_I ⊙ (block(x_I) - x_I))`: the block runs on k = n / `reduction` tokens alone.

    `λ = softtopk(w·x; k, ε)` with a learned w [d], I its k largest; class tokens and registers always run. A is a
    bottleneck beside the block on all tokens. With `reduction=1` it is the parallel adapter. Blocks must treat
    tokens as a set: no windows, no positions or masks made for the whole sequence.

    Behind the last block a class-token head reads nothing that λ weighs, so that a router there would never learn:
    with class tokens the last block uses the w of the block before. Parameters: `2 d r + r + d` a block, d a router.
    """

    at: Selector = "tokens"
    reduction: float = 4.0
    bottleneck: int = 64
    epsilon: float = 0.03

    refuses: ClassVar[tuple[Refusal, ...]] = (
        at_site(lambda site: site.role != "tokens", "it runs whole blocks on fewer tokens, select 'tokens' sites"),
        at_site(
            lambda site: site.prefix_reader,
            "its rotary positions are those of the whole sequence, not of chosen tokens",
        ),
    )

    def __post_init__(self) -> None:
        positive(self, bottleneck=self.bottleneck, epsilon=self.epsilon)
        if self.reduction < 1:
            raise ConfigError(f"CoDA: reduction is tokens over tokens that run, 1 or more, got {self.reduction}")

    @property
    def traits(self) -> Traits:
        return replace(super().traits, identity=self.reduction == 1)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements: list[Placement] = []
        before: dict[str, Conditional] = {}
        for site in self.chosen(available):
            like = any_tensor(model, site)
            part = Conditional(
                Branch(site.width, self.bottleneck, like, source="input"),
                site.width,
                like,
                prefix=site.prefix,
                reduction=self.reduction,
                epsilon=self.epsilon,
                shared=before.get(site.tower) if self._borrows(site, available) else None,
            )
            before[site.tower] = part
            placements.append(Placement(part, site.path, "coda", (Hook(site.path, "around"),), site.role))
        return Placed(placements)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        total, towers = 0, set()
        for site in self.chosen(available):
            total += 2 * site.width * self.bottleneck + self.bottleneck + site.width
            borrowed = site.tower in towers and self._borrows(site, available)
            total += site.width if self.reduction > 1 and not borrowed else 0
            towers.add(site.tower)
        return total

    @staticmethod
    def _borrows(site: Site, available: list[Site]) -> bool:
        """Whether the router would stand in the last block of a tower with class tokens."""
        last = max(s.depth for s in available if s.role == "tokens" and s.tower == site.tower)
        return site.prefix > 0 and site.depth == last
