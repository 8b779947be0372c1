"""L2P (arXiv:2112.08654)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, TaskHeads


class L2P(TaskHeads):
    """A pool of prompts with learned keys; each image runs with those whose keys its query is nearest to.

    The query is the frozen backbone's feature. Images are routed one by one, in training and after it: there is no
    vote over the batch. Loss: cross entropy `− λ Σ cos(query, key chosen) / B`.
    """

    default = mmpeft.VPT(tokens=5)

    def __init__(self, method: Method | None = None, pool: int = 10, top: int = 5, pull: float = 0.5) -> None:
        """
        Args:
            method: one prompt of the pool.
            pool: how many there are.
            top: how many an image uses.
            pull: λ.
        """
        super().__init__(method)
        if not 1 <= top <= pool:
            raise ConfigError(f"top must lie in 1 … pool={pool}, got {top}")
        self.pool, self.top, self.pull = pool, top, pull

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        for i in range(self.pool):
            name = f"prompt{i}"
            if name not in self.bank:
                entry = self.bank.add_task(name, self.tuned())
                key = torch.empty(1, self.width, device=next(self.bank.model.parameters()).device)
                entry.learned["key"] = nn.Parameter(key.uniform_(-1, 1))
            self.bank.unfreeze(name)

    def route(self) -> None:
        return None

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        choice = self.bank.route(self.bank.query(images), "key", self.top)
        return self.bank.features(images, choice.routes()), choice.score

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        features, score = self._features(images)
        return self.local(features, labels) - self.pull * score.sum(1).mean()

    def scores(self, images: Tensor) -> Tensor:
        return self.logits(self._features(images)[0])
