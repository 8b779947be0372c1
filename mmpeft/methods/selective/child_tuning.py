"""Child-tuning: gradients of a part of the network only, chosen by Fisher information (D) or anew each step (F)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.controllers.drop_gradients import DropGradients
from mmpeft.controllers.scores import Loss, Score, Tensors, score
from mmpeft.errors import ConfigError
from mmpeft.methods.base import register
from mmpeft.methods.placed import Placed
from mmpeft.methods.shared.selection import EntryMask
from mmpeft.methods.shared.tensors import TensorMethod
from mmpeft.sites import Site
from mmpeft.types import Batch


@register("https://arxiv.org/abs/2109.05687", "selective", mergeable=True)
@dataclass(frozen=True)
class ChildTuningD(EntryMask):
    """The `density` of the blocks' entries with the largest `Σ_batches (∂L/∂θ)²`, fixed for the whole run."""

    density: float = 0.3
    batches: int | None = None

    score: ClassVar[Score] = "gradient2"

    def scores(self, model: nn.Module, tensors: Tensors, data: Iterable[Batch], loss: Loss) -> Tensors:
        return score(model, tensors, self.score, data, loss, self.batches)


@register("https://arxiv.org/abs/2109.05687", "selective", mergeable=True)
@dataclass(frozen=True)
class ChildTuningF(TensorMethod):
    """All tensors of the blocks train on `g ⊙ m / p` with a fresh `m ~ Bernoulli(p)` at every step.

    Unbiased: `E[g ⊙ m / p] = g`; Adam's own scaling cancels a part of the `1/p`. Saves no memory: it regularises.
    """

    p: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ConfigError(f"ChildTuningF: p is the share of gradients kept, in (0, 1], got {self.p}")

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        return (s for s in available if s.role == "param" and (s.depth >= 0 or bool(self.at)))

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements = super().place(model, available).placements
        trained = [tensor for placement in placements for tensor in placement.part.parameters()]
        return Placed(placements, [DropGradients(trained, self.p)])
