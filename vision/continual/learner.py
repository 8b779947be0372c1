"""`Learner`: what a continual method does before, during and after each task; all it remembers is in its bank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.bank import Bank, LinearHead
from mmpeft.bank.bank import Rows
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.vision.continual.data import SequenceTask

Batches = Iterable[tuple[Tensor, Tensor]]


class Learner(ABC):
    """One method. `scores` has a column for each class seen, in the order of arrival.

    State lives in the bank's entries, so that a bank that was saved and loaded goes on where it stopped.
    """

    revisits = False
    """Whether each task trains on all classes so far (an upper bound, not continual learning)."""
    default: Method | None = None
    bank: Bank
    width: int

    def __init__(self, method: Method | None = None) -> None:
        """
        Args:
            method: what is tuned; None for the method's own choice.
        """
        self.method = method or self.default

    def bind(self, bank: Bank, width: int) -> None:
        """Take a bank, new or loaded."""
        self.bank, self.width = bank, width

    @abstractmethod
    def begin(self, task: SequenceTask, samples: Batches) -> None:
        """Before training: add entries, freeze old ones. `samples` are the task's, without augmentation."""

    def trains(self, task: SequenceTask) -> bool:
        """Whether this task is trained by gradients."""
        return True

    @abstractmethod
    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a training batch of the current task."""

    def epoch(self, share: float) -> None:  # noqa: B027 - optional
        """At the start of an epoch, after that share of them."""

    def after_step(self) -> None:  # noqa: B027 - optional
        """After each optimiser step."""

    def end(self, task: SequenceTask, samples: Batches) -> None:  # noqa: B027 - optional
        """After training: statistics, freezing."""

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """Class scores [B, seen]."""

    def tuned(self) -> Method:
        """The method to attach."""
        if self.method is None:
            raise ConfigError(f"{type(self).__name__} tunes nothing without a method")
        return self.method


class TaskHeads(Learner):
    """A linear head for each task; its loss is the cross entropy among the classes of the current task alone.

    Subclasses say what runs (`route`) and what a task adds (`extend`).
    """

    def begin(self, task: SequenceTask, samples: Batches) -> None:
        for name in self.heads():
            self.bank.freeze(name)
        self.bank.add_task(f"head{task.number}", head=LinearHead(self.width, task.classes))
        self.extend(task, samples)

    @abstractmethod
    def extend(self, task: SequenceTask, samples: Batches) -> None:
        """Add the entries of a task."""

    @abstractmethod
    def route(self) -> Rows:
        """What runs."""

    def heads(self) -> list[str]:
        """Entries that hold the heads, in the order of the tasks."""
        return [name for name in self.bank.ids if isinstance(self.bank[name].head, LinearHead)]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.local(self.bank.features(images, self.route()), labels)

    def local(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy among the current task's classes.

        Raises:
            DataError: a label of another task.
        """
        head = self.bank[self.heads()[-1]].head
        assert isinstance(head, LinearHead)
        return F.cross_entropy(head(features).float(), head.columns(labels))

    def scores(self, images: Tensor) -> Tensor:
        return self.logits(self.bank.features(images, self.route()))

    def logits(self, features: Tensor) -> Tensor:
        """Scores of all heads, [B, seen]."""
        found = []
        for name in self.heads():
            head = self.bank[name].head
            assert head is not None
            found.append(head(features))
        return torch.cat(found, dim=1)

    def end(self, task: SequenceTask, samples: Batches) -> None:
        for name in self.bank.ids:
            self.bank.freeze(name)


@torch.no_grad()
def collected(samples: Batches, features: Iterable[Rows], bank: Bank) -> tuple[Tensor, Tensor]:
    """Features [n, k d] of k routes side by side, and labels [n]."""
    routes = list(features)
    rows, labels = [], []
    for images, own in samples:
        rows.append(torch.cat([bank.features(images, route) for route in routes], dim=1))
        labels.append(own)
    return torch.cat(rows), torch.cat(labels)
