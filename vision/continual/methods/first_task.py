"""Methods that tune on the first task alone and then only count: shared by SimpleCIL, APER and RanPAC."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor

from mmpeft.bank import LinearHead, PrototypeHead, RidgeHead
from mmpeft.bank.bank import Rows
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, Learner, collected


class FirstTask(Learner):
    """A closed-form head on features that stay fixed after the first task."""

    @abstractmethod
    def closed_form(self) -> PrototypeHead | RidgeHead:
        """The head, empty."""

    def routes(self) -> list[Rows]:
        """Whose features lie side by side: the plain backbone's, or those tuned on the first task."""
        return [None] if self.method is None else ["first"]

    def trains(self, task: SequenceTask) -> bool:
        return self.method is not None and task.number == 0

    def begin(self, task: SequenceTask, samples: Batches) -> None:
        if self.trains(task):
            self.bank.add_task("first", self.method, LinearHead(self.width, task.classes))
        if "count" not in self.bank:
            self.bank.add_task("count", head=self.closed_form())

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        head = self.bank["first"].head
        assert isinstance(head, LinearHead)
        return F.cross_entropy(head(self.bank.features(images, "first")).float(), head.columns(labels))

    def end(self, task: SequenceTask, samples: Batches) -> None:
        if "first" in self.bank:
            self.bank.freeze("first")
        self._head().fit(*collected(samples, self.routes(), self.bank))

    def _head(self) -> PrototypeHead | RidgeHead:
        head = self.bank["count"].head
        assert isinstance(head, PrototypeHead | RidgeHead)
        return head

    def scores(self, images: Tensor) -> Tensor:
        features, _ = collected([(images, images.new_zeros(len(images)))], self.routes(), self.bank)
        scores: Tensor = self._head()(features)
        return scores
