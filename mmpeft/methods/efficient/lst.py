"""Ladder side-tuning: a narrow stack beside the backbone, fed by its blocks, with no gradient through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from mmpeft.errors import Refused
from mmpeft.methods.base import Sited, register
from mmpeft.methods.needs import Refusal, at_site
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.recipe import any_tensor, positive
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.side import Ladder, SideBlock, SideLayer
from mmpeft.sites import Selector, Site


def _not_at_the_end(method: LST, chosen: Sequence[Site], available: Sequence[Site]) -> Site | None:
    """The last chosen block of a tower that goes on behind it."""
    for stack in _towers(chosen):
        if stack[-1].depth != max(s.depth for s in available if s.role == "block" and s.tower == stack[0].tower):
            return stack[-1]
    return None


def _maps_and_tokens(method: LST, chosen: Sequence[Site], available: Sequence[Site]) -> Site | None:
    return next((stack[0] for stack in _towers(chosen) if len({s.channel_dim for s in stack}) > 1), None)


def _looking_across(method: LST, chosen: Sequence[Site], available: Sequence[Site]) -> Site | None:
    """A block of one of several chosen towers that looks at another one."""
    crossing = {s.tower for s in available if s.role == "cross"}
    stacks = _towers(chosen)
    found = sorted((stack[0] for stack in stacks if stack[0].tower in crossing), key=lambda s: s.tower)
    return found[0] if len(stacks) > 1 and found else None


def _towers(chosen: Sequence[Site]) -> list[list[Site]]:
    """The chosen blocks of each tower, in the order in which they run."""
    towers = dict.fromkeys(site.tower for site in chosen)
    return [sorted((s for s in chosen if s.tower == tower), key=lambda s: s.depth) for tower in towers]


@register("https://arxiv.org/abs/2206.06522", "efficient", mergeable=False, identity=False)
@dataclass(frozen=True)
class LST(Sited):
    """`u_i = SideBlock_i(μ_i u_{i-1} + (1 - μ_i) W_i↓ sg(h_i))` of width d / `reduction`, then `W↑ u_L` to the head.

    The blocks run without gradients: nothing of them is kept for the backward pass. `output="replace"` gives the
    head `W↑ u_L` as the paper has it; `"add"` gives it `h_L + W↑ u_L` with `W↑ = 0`, which starts from the backbone.
    `drop=n` leaves out the rungs at depths 0, n, 2n, …

    Side blocks are small transformer blocks where the backbone's tokens are a plain sequence (`tokens` sites), and
    work on each token by itself elsewhere, which is right under any mask, window or cache, generation included;
    what tokens know of one another then comes from h. They start at random (the paper also prunes the backbone).
    """

    at: Selector = "block"
    reduction: int = 8
    drop: int | None = None
    temperature: float = 0.1
    attention: bool | None = None
    output: Literal["replace", "add"] = "replace"

    refuses: ClassVar[tuple[Refusal, ...]] = (
        at_site(lambda s: s.role != "block" or not s.width, "it runs beside whole blocks, select 'block' sites"),
        Refusal(_not_at_the_end, "the side stack must end at the last block, whose output it replaces"),
        Refusal(_maps_and_tokens, "blocks on maps and blocks on tokens take turns, no side stack fits both"),
        Refusal(
            _looking_across,
            "the blocks of {site.tower!r} look at another tower without gradients, whose side stack would not learn "
            "from them; select one tower, at='{site.tower}:block'",
        ),
    )

    def __post_init__(self) -> None:
        positive(self, reduction=self.reduction, drop=self.drop, temperature=self.temperature)

    @property
    def traits(self) -> Traits:
        return replace(super().traits, identity=self.output == "add")

    def stacks(self, available: list[Site]) -> list[list[Site]]:
        """The chosen blocks of each tower, in the order in which they run."""
        return _towers(self.chosen(available))

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements = []
        for stack in self.stacks(available):
            ladder, below = Ladder(), self.width(stack[0])
            for i, site in enumerate(stack):
                like, side = any_tensor(model, site), self.width(site)
                part = SideLayer(ladder, i, self.temperature, site.channel_dim)
                if i == 0:
                    part.begin(site.width, below, like)
                if not self.dropped(site):
                    part.climb(site.width, side, below, self.attends(site, available), like)
                    below = side
                if i == len(stack) - 1:
                    part.end(below, site.width, self.output == "add", like)
                placements.append(Placement(part, site.path, "lst", (Hook(site.path, "around"),), site.role))
        return Placed(placements)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        total = 0
        for stack in self.stacks(available):
            below = self.width(stack[0])
            total += stack[0].width * below
            for site in stack:
                side = self.width(site)
                if not self.dropped(site):
                    total += site.width * side + 1 + (below * side if below != side else 0)
                    total += SideBlock.count(side, self.attends(site, available))
                    below = side
            total += below * stack[-1].width
        return total

    def width(self, site: Site) -> int:
        return max(1, site.width // self.reduction)

    def dropped(self, site: Site) -> bool:
        return self.drop is not None and site.depth % self.drop == 0

    def attends(self, site: Site, available: list[Site]) -> bool:
        tokens = next((s for s in available if s.role == "tokens" and s.path == site.path), None)
        plain = tokens is not None and not tokens.refuse
        if self.attention and not plain:
            why = tokens.refuse if tokens is not None else "the anatomy names no sequence of tokens"
            raise Refused(f"LST at {site}: side blocks cannot attend here: {why}")
        return plain if self.attention is None else self.attention
