"""O-LoRA (arXiv:2310.14152)."""

from __future__ import annotations

import torch
from torch import Tensor

import mmpeft
from mmpeft.bank.bank import Rows
from mmpeft.methods.base import Method
from mmpeft.parts import Delta
from mmpeft.surgery.together import Together
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, TaskHeads


class SummedLoRA(TaskHeads):
    """A LoRA for each task, `t0`, `t1`, …; all of them run, the newest trains."""

    default: Method | None = mmpeft.LoRA(rank=10, alpha=10.0, at="attn.{q,v}")

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        for name in self.loras():
            self.bank.freeze(name)
        self.bank.add_task(f"t{task.number}", self.tuned())

    def loras(self) -> list[str]:
        """Entries that tune, the newest last."""
        return [name for name in self.bank.ids if self.bank[name].method is not None]

    def route(self) -> Rows:
        return Together(tuple(self.loras()))

    def deltas(self, name: str) -> dict[str, Delta]:
        """The parts of one entry by site."""
        found = {f"{p.home}.{p.role}": p.part for p in self.bank.tuning(name).placements}
        return {site: part for site, part in found.items() if isinstance(part, Delta)}


class OLoRA(SummedLoRA):
    """Adds `λ₁ Σ |A_old A_newᵀ| + λ₂ ‖A_new, B_new‖` to the loss: tasks learn in orthogonal subspaces."""

    def __init__(self, method: Method | None = None, orthogonal: float = 0.5, decay: float = 0.0) -> None:
        """
        Args:
            method: a low-rank method.
            orthogonal: λ₁.
            decay: λ₂.
        """
        super().__init__(method)
        self.orthogonal, self.decay = orthogonal, decay

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        *old, new = self.loras()
        loss = super().loss(images, labels)
        own = self.deltas(new)
        for name in old:
            past = self.deltas(name)
            terms: list[Tensor] = [(past[s].pair()[0] @ own[s].pair()[0].T).abs().sum() for s in own]
            loss = loss + self.orthogonal * torch.stack(terms).sum()
        if self.decay:
            loss = loss + self.decay * sum(p.norm() for p in self.bank.tuning(new).parameters())
        return loss
