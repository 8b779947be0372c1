"""The bounds: one tuning trained task after task, and one trained on everything seen."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import mmpeft
from mmpeft.bank import LinearHead
from mmpeft.bank.bank import Rows
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, TaskHeads


class Finetune(TaskHeads):
    """One tuning and one head over all classes seen, trained on the current task: forgets, the lower bound."""

    default = mmpeft.LoRA(rank=8, at="attn.{q,v}")

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        if "all" not in self.bank:
            self.bank.add_task("all", self.tuned())
        for name in self.bank.ids:
            self.bank.unfreeze(name)

    def route(self) -> Rows:
        return "all"

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(images).float(), labels)


class Joint(Finetune):
    """A new tuning trained on all classes seen, at every task: the upper bound, and no continual learning."""

    revisits = True

    def begin(self, task: SequenceTask, samples: Batches) -> None:
        for name in self.bank.ids:
            self.bank.remove(name)
        self.bank.add_task("all", self.tuned(), LinearHead(self.width, range(task.stop)))
