"""LAE (arXiv:2303.10070)."""

from __future__ import annotations

import torch
from torch import Tensor

import mmpeft
from mmpeft.bank.bank import Rows
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, TaskHeads


class LAE(TaskHeads):
    """An online tuning and its moving average; the answer is the larger of the two softmaxes, class by class.

    After the first task the online tuning rests for the first `rest` of the epochs, while the new head learns.
    """

    default = mmpeft.AdaptFormer(at="mlp & depth<=4")

    def __init__(self, method: Method | None = None, decay: float = 0.9999, rest: float = 0.6) -> None:
        """
        Args:
            method: what is tuned.
            decay: of the moving average, a step (0.9999 in the paper, for long runs).
            rest: share of the epochs, after the first task, in which only the head trains.
        """
        super().__init__(method)
        if not 0 <= decay <= 1 or not 0 <= rest <= 1:
            raise ConfigError(f"decay and rest lie in [0, 1], got {decay} and {rest}")
        self.decay, self.rest = decay, rest

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        if "online" not in self.bank:
            for name in ("online", "average"):
                self.bank.add_task(name, self.tuned())
            self.bank.tuning("average").load_state_dict(self.bank.tuning("online").state_dict())
        self.bank.freeze("average")
        self.bank.unfreeze("online")
        self.first = task.number == 0

    def epoch(self, share: float) -> None:
        if self.first or share >= self.rest:
            self.bank.unfreeze("online")
        else:
            self.bank.freeze("online")

    @torch.no_grad()
    def after_step(self) -> None:
        average, online = (self.bank.tuning(name).parameters() for name in ("average", "online"))
        for slow, fast in zip(average, online):
            slow.lerp_(fast, 1 - self.decay)

    def route(self) -> Rows:
        return "online"

    def scores(self, images: Tensor) -> Tensor:
        both = [self.logits(self.bank.features(images, name)).softmax(1) for name in ("online", "average")]
        return torch.maximum(*both)
