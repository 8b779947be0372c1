"""DualPrompt (arXiv:2204.04799)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft
from mmpeft.methods.base import Method
from mmpeft.surgery.together import Together
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, TaskHeads


class DualPrompt(TaskHeads):
    """A general prefix at the first layers, and one for each task above them, found by its key at test time.

    Training knows the task; its key is pulled to the queries, `1 − cos`. Each image finds its own prefix.
    """

    default = mmpeft.PTuningV2(at="kv & depth>=2 & depth<=4", tokens=5)

    def __init__(self, method: Method | None = None, general: Method | None = None, pull: float = 1.0) -> None:
        """
        Args:
            method: the prefix of a task.
            general: the prefix all tasks share.
            pull: weight of the key's term.
        """
        super().__init__(method)
        self.general = general or mmpeft.PTuningV2(at="kv & depth<=1", tokens=5)
        self.pull = pull

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        for name in list(self.bank.keys()):
            self.bank.freeze(name)
        if "general" not in self.bank:
            self.bank.add_task("general", self.general)
        self.bank.unfreeze("general")
        entry = self.bank.add_task(f"t{task.number}", self.tuned())
        key = torch.empty(1, self.width, device=next(self.bank.model.parameters()).device)
        entry.learned["key"] = nn.Parameter(key.uniform_(-1, 1))

    def route(self) -> Together:
        return Together(("general", list(self.bank.keys())[-1]))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        keys = self.bank.keys()
        pull = 1 - F.cosine_similarity(self.bank.query(images), keys[list(keys)[-1]]).mean()
        return super().loss(images, labels) + self.pull * pull

    def scores(self, images: Tensor) -> Tensor:
        choice = self.bank.route(self.bank.query(images), "key")
        return self.logits(self.bank.features(images, choice.routes("general")))
