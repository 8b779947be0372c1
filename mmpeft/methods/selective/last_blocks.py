"""Partial fine-tuning: the last blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.methods.base import register
from mmpeft.methods.needs import Need
from mmpeft.methods.recipe import positive
from mmpeft.methods.shared.statistics import WholeModules
from mmpeft.sites import Site
from mmpeft.sites.selector import select


@register("https://arxiv.org/abs/1411.1792", "selective", mergeable=True)
@dataclass(frozen=True)
class LastBlocks(WholeModules):
    """Every tensor of the last `blocks` blocks trains, running statistics in them included.

    Of several towers those train that end before the output: the decoder behind an encoder, the language model behind
    an image tower, both towers of a pair. `at="tower=encoder"` chooses among the blocks of that tower.
    """

    blocks: int = 1

    needs: ClassVar[tuple[Need, ...]] = (Need("blocks", "block", tensors=True),)

    def __post_init__(self) -> None:
        positive(self, blocks=self.blocks)

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        wanted = {site.tower for site in (select(available, self.at) if self.at else available)}
        found = [site for site in available if site.role == "block" and site.tower in wanted]
        found = [site for site in found if not site.below] or found
        ends = {site.tower: max(s.depth for s in found if s.tower == site.tower) for site in found}
        most = 1 + max(ends.values(), default=-1)
        if self.blocks > most:
            raise ConfigError(f"LastBlocks(blocks={self.blocks}): {type(model).__name__} has {most} blocks")
        tensors = (site for site in available if site.role == "param" and site.depth >= 0 and site.tower in ends)
        return (site for site in tensors if site.depth > ends[site.tower] - self.blocks)
