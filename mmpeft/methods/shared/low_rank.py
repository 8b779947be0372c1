"""LoRA whose rank components are gated: what training has closed is left out of the saved adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.controllers import Controller
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.methods.placed import Placed, Tensors
from mmpeft.methods.recipe import fan
from mmpeft.methods.reparameterized.lora import LoRA
from mmpeft.parts import Delta, DiagonalLowRank
from mmpeft.parts.base import Placement
from mmpeft.sites import Kind, Site


@dataclass(frozen=True)
class PrunedLoRA(LoRA):
    """`ΔW = s B diag(g) A`; components with `g_k = 0` are gone for good once the tuning is baked."""

    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    def factors(self, placements: Sequence[Placement]) -> list[DiagonalLowRank]:
        found = [p.part.factor for p in placements if isinstance(p.part, Delta)]
        return [factor for factor in found if isinstance(factor, DiagonalLowRank)]

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(rank * (sum(fan(model, site)) + 1) for site, rank, _ in self.sized(available))

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements = super().place(model, available).placements
        return Placed(placements, self.drive(self.factors(placements)), partial(self._bake, placements))

    @abstractmethod
    def drive(self, factors: list[DiagonalLowRank]) -> list[Controller]:
        """What opens and closes the components."""

    def _bake(self, placements: Sequence[Placement]) -> tuple[Method, Tensors]:
        """The LoRA of what is left, g and the scale inside B.

        Raises:
            ConfigError: nothing is left.
        """
        alive = [factor.g.detach() != 0 for factor in self.factors(placements)]
        return as_lora(placements, alive, "every component is closed: lower the sparsity, or train with a higher rank")


def as_lora(placements: Sequence[Placement], alive: Sequence[Tensor], empty: str) -> tuple[Method, Tensors]:
    """A LoRA with the living components of each placement as its rank, and its tensors in the order it places them."""
    ranks: dict[str, int] = {}
    for p, mask in zip(placements, alive):
        if mask.any():
            at = f"{p.role} & path={p.home}"
            ranks[at] = max(ranks.get(at, 0), int(mask.sum()))
    if not ranks:
        raise ConfigError(empty)
    tensors = []
    for p, mask in zip(placements, alive):
        rank = ranks.get(f"{p.role} & path={p.home}", 0)
        if rank:
            assert isinstance(p.part, Delta)
            down, up = (tensor.detach() for tensor in p.part.pair())
            down, up = down[mask[: len(down)]], up[:, mask[: len(down)]] * p.part.scale
            short = rank - len(down)  # another site of the same path and role has a higher rank
            pad = torch.nn.functional.pad
            tensors.append({"factor.A": pad(down, (0, 0, 0, short)), "factor.B": pad(up, (0, short))})
    top = max(ranks.values())
    return LoRA("|".join(ranks), top, float(top), rank_pattern=ranks, alpha_pattern=ranks), tensors
