"""Which tone it is."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmpeft.data.contract import HasClasses
from mmpeft.methods.base import Method
from mmpeft.tasks.labels import check_labels
from mmpeft.tasks.options import TrainingOptions
from mmpeft.tasks.predictions import class_file
from mmpeft.tasks.task import Task
from tones.network import ToneNet


class ToneClassifier(Task):
    """Tunes a tone network to the classes of the data module."""

    def __init__(self, width: int = 16, method: Method | None = None, **options: Unpack[TrainingOptions]) -> None:
        """
        Args:
            width: of the network.
            method: what is trained and how.
            options: those of `TuningModule`.
        """
        super().__init__(method, **options)
        self.width = width
        self.classes: list[str] = []

    def build(self) -> nn.Module:
        data = self.data(HasClasses)
        self.classes = list(data.classes) if data else self.classes
        return ToneNet(len(self.classes), self.width)

    def start(self) -> None:
        self.right = nn.ModuleDict({f"{stage}_right": MeanMetric() for stage in ("val", "test")})

    def forward(self, waves: Tensor) -> Tensor:
        self.prepare()
        return self.model(waves)

    def check(self, batch: tuple[Tensor, Tensor]) -> None:
        check_labels(batch[1], len(self.classes))

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        self.right[f"{stage}_right"].update((self(batch[0]).argmax(1) == batch[1]).float())

    def results(self, stage: str) -> Mapping[str, Tensor]:
        metric = self.right[f"{stage}_right"]
        value = metric.compute()
        metric.reset()
        return {"accuracy": value}

    def meaning(self) -> Mapping[str, Any]:
        return {"classes": self.classes}

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], index: int) -> dict[str, Any]:
        return {"id": list(batch[1]), "probabilities": self(batch[0]).softmax(1)}

    def configure_callbacks(self) -> list[Callback]:
        return [*super().configure_callbacks(), class_file("tones.csv", lambda: self.classes)]
