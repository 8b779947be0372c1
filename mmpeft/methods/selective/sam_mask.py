"""Second-order approximation method: the entries of largest accumulated gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mmpeft.controllers.scores import Loss, Score, Tensors, score
from mmpeft.methods.base import register
from mmpeft.methods.recipe import positive
from mmpeft.methods.shared.selection import EntryMask
from mmpeft.types import Batch


@register("https://arxiv.org/abs/2211.15583", "selective", mergeable=True)
@dataclass(frozen=True)
class SAMMask(EntryMask):
    """The `density` of each tensor's entries with the largest `|Σ_t ∂L_t/∂θ|`, nothing updated meanwhile.

    The paper's score is `(∂L)²/h` with a curvature h taken as constant. Not sharpness-aware minimisation.
    """

    batches: int = 600

    score: ClassVar[Score] = "signed"
    scope: ClassVar[Literal["global", "tensor"]] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, batches=self.batches)

    def scores(self, model: nn.Module, tensors: Tensors, data: Iterable[Batch], loss: Loss) -> Tensors:
        return score(model, tensors, self.score, data, loss, self.batches)
