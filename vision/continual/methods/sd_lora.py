"""SD-LoRA (arXiv:2501.13198)."""

from __future__ import annotations

import torch
from torch import nn

from mmpeft.bank.bank import Rows
from mmpeft.methods.base import Method
from mmpeft.surgery.together import Together
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches
from mmpeft.vision.continual.methods.o_lora import SummedLoRA


class SDLoRA(SummedLoRA):
    """`W x + Σ_{i<t} α_i B_i A_i x / (‖B_i‖ ‖A_i‖) + α_t B_t A_t x`: old directions stay, all magnitudes α train."""

    def __init__(self, method: Method | None = None, start: float = 0.8) -> None:
        """
        Args:
            method: a low-rank method.
            start: where each α starts.
        """
        super().__init__(method)
        self.start = start

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        super().extend(task, samples)
        if "gains" not in self.bank:
            self.bank.add_task("gains")
        gains = self.bank["gains"].learned
        like = next(self.bank.model.parameters())
        gains[self.loras()[-1]] = nn.Parameter(torch.tensor(self.start, device=like.device))
        self.bank.unfreeze("gains")

    def route(self) -> Rows:
        names, gains = tuple(self.loras()), self.bank["gains"].learned
        return Together(names, tuple(gains[name] for name in names), unit=names[:-1])
