"""FISH mask: the entries of largest Fisher information."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from torch import nn

from mmpeft.controllers.scores import Loss, Score, Tensors, samples, score
from mmpeft.methods.base import register
from mmpeft.methods.recipe import positive
from mmpeft.methods.shared.selection import EntryMask
from mmpeft.types import Batch


@register("https://arxiv.org/abs/2111.09839", "selective", mergeable=True)
@dataclass(frozen=True)
class FishMask(EntryMask):
    """The `density` of entries with the largest `F = Σ_n (∂ log p(y_n|x_n)/∂θ)²` over single samples.

    `expected=True` takes the sum over all classes, `Σ_y p(y|x) (…)²`, and needs no labels.
    """

    samples: int = 1024
    expected: bool = False

    score: ClassVar[Score] = "fisher"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, samples=self.samples)

    def scores(self, model: nn.Module, tensors: Tensors, data: Iterable[Batch], loss: Loss) -> Tensors:
        single = islice((sample for batch in data for sample in samples(batch)), self.samples)
        return score(model, tensors, "expected_fisher" if self.expected else "fisher", single, loss)
