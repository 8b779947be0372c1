"""DyLoRA: one training run, every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.controllers.rank import RandomRank
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method, register
from mmpeft.methods.placed import Placed, Tensors
from mmpeft.methods.reparameterized.lora import LoRA
from mmpeft.methods.shared.low_rank import as_lora
from mmpeft.parts import Delta, Factor, NestedLowRank
from mmpeft.parts.base import Placement
from mmpeft.sites import Kind, Site


@register("https://arxiv.org/abs/2210.07558", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class DyLoRA(LoRA):
    """`ΔW = (α/b) B[:, :b] A[:b]` with one `b ~ U{least, …, rank}` for all sites at each step.

    `at_rank(tuning.placements, b)` cuts any rank out afterwards; it is then what is saved, merged and exported.
    `frozen` trains the b-th component alone. Parameters: `r (i + o)` a site.
    """

    least: int = 1
    frozen: bool = False

    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.least <= self.rank:
            raise ConfigError(f"DyLoRA: least is the lowest rank trained, in 1 … rank={self.rank}, got {self.least}")

    def factor(self, rows: int, columns: int, rank: int, like: Tensor, lookup: bool) -> Factor:
        factor = NestedLowRank(rows, columns, rank, like)
        factor.newest_alone = self.frozen
        return factor

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements = super().place(model, available).placements
        return Placed(placements, [RandomRank(nested(placements), self.least)], partial(_at_active_rank, placements))


def _at_active_rank(placements: Sequence[Placement]) -> tuple[Method, Tensors]:
    """The LoRA of the rank that is active."""
    alive = [torch.arange(len(factor.A), device=factor.A.device) < factor.active for factor in nested(placements)]
    return as_lora(placements, alive, "")


def at_rank(placements: Sequence[Placement], rank: int) -> None:
    """Let the first `rank` components act alone, everywhere: also in what is then merged, baked or exported.

    Raises:
        ConfigError: not a DyLoRA, or a rank it has not.
    """
    factors = nested(placements)
    highest = max((len(factor.A) for factor in factors), default=0)
    if not 1 <= rank <= highest:
        raise ConfigError(f"expected a DyLoRA and one of its ranks 1 … {highest}, got {rank}")
    for factor in factors:
        factor.active = min(rank, len(factor.A))


def nested(placements: Sequence[Placement]) -> list[NestedLowRank]:
    found = [p.part.factor for p in placements if isinstance(p.part, Delta)]
    return [factor for factor in found if isinstance(factor, NestedLowRank)]
