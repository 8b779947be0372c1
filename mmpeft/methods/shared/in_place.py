"""What prompts in place of a text's own tokens share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.methods.base import Sited
from mmpeft.methods.needs import Need, Refusal
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import any_tensor, positive
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.in_place import InPlace
from mmpeft.sites import Selector, Site


def _not_one(method: InPlacePrompt, chosen: Sequence[Site], available: Sequence[Site]) -> Site | None:
    """A chosen site, if not exactly one is an embedding of words."""
    return None if len([site for site in chosen if site.kind == "embedding"]) == 1 else chosen[0]


@dataclass(frozen=True)
class InPlacePrompt(Sited):
    """`tokens` learned tokens behind the first `position` ones of a text that leaves room for them.

    Up to `depth` they replace what the former block made of them; deeper they go on as any token does.
    """

    at: Selector = "text:embed"
    tokens: int = 4
    depth: int = 1
    position: int = 1
    std: float = 0.02

    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(_not_one, "it wants exactly one embedding of words; choose a text tower's, as at='text:embed' does"),
    )

    def __post_init__(self) -> None:
        positive(self, tokens=self.tokens, depth=self.depth)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("words of a text tower to replace", self.at, "embedding"),)

    def levels(self, available: list[Site]) -> list[Site]:
        """The embedding and the blocks at whose entry prompts stand."""
        chosen = [site for site in self.chosen(available) if site.kind == "embedding"]
        blocks = [s for s in available if s.role == "block" and s.tower == chosen[0].tower]
        return [*chosen, *(site for site in blocks if 0 < site.depth < self.depth)]

    def texts(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        """One part for the embedding and one for each further level."""
        placements = []
        for site in self.levels(available):
            part = InPlace(self.tokens, site.width, self.position, self.std, any_tensor(model, site))
            kind = Hook(site.path, "exit" if site.kind == "embedding" else "enter")
            placements.append(Placement(part, site.path, type(self).__name__.lower(), (kind,), site.role))
        return placements

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        return Placed(self.texts(model, available))

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(self.tokens * site.width for site in self.levels(available))
