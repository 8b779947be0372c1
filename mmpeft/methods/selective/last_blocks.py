"""Partial fine-tuning: the last blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.methods.base import positive, register
from mmpeft.methods.shared.statistics import WholeModules
from mmpeft.sites import Site


@register("https://arxiv.org/abs/1411.1792", "selective", mergeable=True)
@dataclass(frozen=True)
class LastBlocks(WholeModules):
    """Every tensor of the last `blocks` blocks trains, running statistics in them included."""

    blocks: int = 1

    def __post_init__(self) -> None:
        positive(self, blocks=self.blocks)

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        depths = {site.depth for site in available if site.role == "block"}
        if self.blocks > len(depths):
            raise ConfigError(f"LastBlocks(blocks={self.blocks}): {type(model).__name__} has {len(depths)} blocks")
        first = max(depths) - self.blocks + 1
        return (site for site in available if site.role == "param" and site.depth >= first)
