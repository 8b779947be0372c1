"""EASE (arXiv:2403.12030)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import mmpeft
from mmpeft.bank.bank import Rows
from mmpeft.methods.base import Method
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, TaskHeads, collected


class EASE(TaskHeads):
    """An adapter for each task, each a subspace with class means of its own; all subspaces vote.

    `score_c = cos in the subspace of c's task + (α/t) Σ cos in the others`. Old classes have no samples in a new
    subspace: their means there are completed from the new classes, by similarity in the old class's own subspace.
    """

    default = mmpeft.AdaptFormer()

    def __init__(self, method: Method | None = None, others: float = 0.1) -> None:
        """
        Args:
            method: what is tuned for each task.
            others: α.
        """
        super().__init__(method)
        self.others = others

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        for name in self.spaces():
            self.bank.freeze(name)
        self.bank.add_task(f"t{task.number}", self.tuned())

    def spaces(self) -> list[str]:
        """The adapters, in the order of the tasks."""
        return [name for name in self.bank.ids if self.bank[name].method is not None]

    def route(self) -> Rows:
        return self.spaces()[-1]

    def end(self, task: SequenceTask, samples: Batches) -> None:
        super().end(task, samples)
        if "means" not in self.bank:
            self.bank.add_task("means")
        state, spaces = self.bank["means"].state, self.spaces()
        features, labels = collected(samples, spaces, self.bank)
        wide = torch.stack([features[labels == c].mean(0) for c in task.classes])
        new = dict(zip(spaces, wide.split(self.width, dim=1)))
        *old, newest = spaces
        completed = [new[newest]]
        if old:
            owner = self.owners()[: task.start]
            rows = [complete(state[old[s]][c], new[old[s]], new[newest]) for c, s in enumerate(owner.tolist())]
            completed.insert(0, torch.stack(rows))
        for name in old:
            state[name] = torch.cat([state[name], new[name]])
        state[newest] = torch.cat(completed)

    def owners(self) -> Tensor:
        """The task of each class seen."""
        heads = [self.bank[name].head for name in self.heads()]
        sizes = [len(head.labels) for head in heads if head is not None]
        return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

    def scores(self, images: Tensor) -> Tensor:
        owner, spaces = self.owners().to(images.device), self.spaces()
        total = torch.zeros(len(images), len(owner), device=images.device)
        for s, name in enumerate(spaces):
            features = self.bank.features(images, name)
            cosine = F.normalize(features, dim=1) @ F.normalize(self.bank["means"].state[name], dim=1).T
            total += cosine * torch.where(owner == s, 1.0, self.others / len(spaces))
        return total


def complete(old: Tensor, new: Tensor, new_there: Tensor) -> Tensor:
    """`Σ_j softmax_j(cos(old, new_j)) new_there_j`: a class mean [d] where the class has no samples."""
    weights = (F.normalize(new, dim=1) @ F.normalize(old, dim=0)).softmax(0)
    return weights @ new_there
