"""Lottery-ticket sparse fine-tuning: the entries that dense fine-tuning moves most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.controllers.scores import Loss, Score, Tensors, dense_change
from mmpeft.methods.base import register
from mmpeft.methods.recipe import positive
from mmpeft.methods.shared.selection import EntryMask
from mmpeft.types import Batch


@register("https://arxiv.org/abs/2110.07560", "selective", mergeable=True)
@dataclass(frozen=True)
class LTSFT(EntryMask):
    """Fine-tune densely for `steps` from θ0 to θ1, keep the `density` of largest `|θ1 - θ0|`, rewind, train those.

    `l1` adds `λ mean|θ - θ0|` to the dense loss. Norms stay frozen in the paper: `matrices` alone are candidates.
    The deltas of two tasks add up: `θ0 + δ_a + δ_b`.
    """

    density: float = 0.01
    steps: int = 500
    lr: float = 1e-4
    l1: float = 0.0

    score: ClassVar[Score] = "gradient2"
    matrices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, steps=self.steps, lr=self.lr)

    def scores(self, model: nn.Module, tensors: Tensors, data: Iterable[Batch], loss: Loss) -> Tensors:
        return dense_change(model, tensors, data, loss, steps=self.steps, lr=self.lr, l1=self.l1)
