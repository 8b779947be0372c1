"""Image classification: a timm backbone with a head, any method, cross entropy. Copy this file to start a new task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)
from torchvision.transforms import v2

from mmpeft.data.contract import HasClasses, configure
from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.methods.base import Method
from mmpeft.tasks.labels import check_labels
from mmpeft.tasks.metrics import Metrics
from mmpeft.tasks.options import TrainingOptions
from mmpeft.tasks.pictures import picture_grid
from mmpeft.tasks.predictions import class_file
from mmpeft.tasks.publish import folder_of
from mmpeft.tasks.task import Task
from mmpeft.types import Facts, Fields, Kwargs
from mmpeft.vision.backbone import create, normalisation
from mmpeft.vision.classification.draw import class_table, confusion_png

SHOWN = 32


class ImageClassifier(Task):
    """Adapts an image backbone to the classes of the data module.

    Batches are `(images float [B, 3, H, W], labels int64 [B])`; to predict, `(images, identifiers)`.
    """

    monitor = ("val/accuracy", "max")
    headline = ("loss", "accuracy")

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        pretrained: bool = True,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_classes: int | None = None,
        model_args: Kwargs | None = None,
        predictions: str = "predictions.csv",
        **options: Unpack[TrainingOptions],
    ) -> None:
        """
        Args:
            backbone: a timm name, a local folder, or `embedded:<name>`.
            method: what is trained and how; the command line fills it from the key `method`.
            pretrained: whether to load the backbone's weights.
            label_smoothing: share of the target spread over all classes.
            mixup: alpha of MixUp; 0 for none.
            cutmix: alpha of CutMix; 0 for none. With both, each batch draws one of the two.
            num_classes: taken from the data module unless there is none.
            model_args: further arguments for the backbone, such as `drop_path_rate`.
            predictions: file that `predict` writes, .csv or .jsonl, inside the run's folder unless absolute.
            options: those of `TuningModule`.
        """
        super().__init__(method, **options)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if min(mixup, cutmix) < 0:
            raise ConfigError(f"mixup and cutmix are alphas of Beta(alpha, alpha) >= 0, got {mixup} and {cutmix}")
        self.backbone, self.pretrained, self.model_args = backbone, pretrained, dict(model_args or {})
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self.num_classes, self.predictions = num_classes, predictions
        self.classes: list[str] = []

    def build(self) -> nn.Module:
        given = self.num_classes
        data = self.data(HasClasses) if given is None else self.datamodule
        self.classes = [str(name) for name in getattr(data, "classes", ())]
        count = len(self.classes) or given
        if not count or given not in (None, count):
            raise ConfigError(
                f"num_classes={given}, but {type(data).__name__} has {len(self.classes)} classes"
                if count
                else "give num_classes, or a data module that names its `classes`"
            )
        if count < 2:
            raise ConfigError(
                f"{type(data).__name__} has one class, {', '.join(self.classes)}: nothing is to be told apart; add "
                "pictures of what it is not as a second one, and see that `root` holds the classes themselves"
            )
        self.num_classes = count
        self.classes = self.classes or [str(i) for i in range(count)]
        model = create(self.backbone, num_classes=count, pretrained=self.pretrained, **self.model_args)
        self.preprocessing = normalisation(model)
        configure(data, self.preprocessing)
        return model

    def start(self) -> None:
        assert self.num_classes is not None
        mixes = [v2.MixUp(alpha=self.mixup, num_classes=self.num_classes)] if self.mixup else []
        mixes += [v2.CutMix(alpha=self.cutmix, num_classes=self.num_classes)] if self.cutmix else []
        self.mixed = v2.RandomChoice(mixes) if mixes else None
        self.metrics: Metrics[MetricCollection] = Metrics(
            {f"{stage}_metrics": metrics(self.num_classes) for stage in ("val", "test")}
        )

    def configure_callbacks(self) -> list[Callback]:
        return [*super().configure_callbacks(), class_file(self.predictions, lambda: self.classes)]

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, [B, classes]."""
        self.prepare()
        assert self.model is not None
        scores: Tensor = self.model(images)
        return scores

    def check(self, batch: tuple[Tensor, Tensor]) -> None:
        check_labels(batch[1], self.num_classes or 0)

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        if self.mixed is not None:
            images, labels = self.mixed(images, labels)
        loss = F.cross_entropy(self(images).float(), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss_step", loss, prog_bar=True)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Update the metrics; class scores, [B, classes]."""
        images, labels = batch
        scores: Tensor = self(images).float()
        self.metrics[f"{stage}_metrics"].update(scores, labels)
        self.log(f"{stage}/loss", F.cross_entropy(scores, labels), batch_size=len(images), sync_dist=True)
        return scores

    def classified(self, batch: tuple[Tensor, Tensor], found: Tensor) -> tuple[Tensor, Tensor]:
        return batch[1], found.argmax(1)

    def results(self, stage: str) -> Mapping[str, Tensor]:
        metric = self.metrics[f"{stage}_metrics"]
        found: dict[str, Tensor] = metric.compute()
        metric.reset()
        self.show_confusion(found.pop("confusion").cpu(), stage)
        return found

    def show_confusion(self, matrix: Tensor, stage: str) -> None:
        """Write `<stage>_classes.csv`, and draw the matrix."""
        if self.trainer.sanity_checking:
            return
        folder = folder_of(self.trainer)
        if folder is not None:
            write_atomic(folder / f"{stage}_classes.csv", class_table(matrix, self.classes).encode())
        self.publish(stage, lambda: {"confusion": confusion_png(matrix, self.classes)})

    def draw_inputs(self, batch: tuple[Tensor, Tensor]) -> Mapping[str, bytes]:
        images, labels = batch[0][:SHOWN], batch[1][:SHOWN]
        names = [self.classes[int(label)] for label in labels]
        return {"images": picture_grid(self.preprocessing.restore(images), names)}

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], index: int) -> Fields:
        """Identifiers and class probabilities of one batch; `PredictionFile` puts them into a file."""
        images, identifiers = batch
        return {"id": list(identifiers), "probabilities": self(images).float().softmax(-1).cpu()}

    def meaning(self) -> Facts:
        return {"classes": self.classes}


def metrics(classes: int) -> MetricCollection:
    """Accuracy over samples and over classes, top 5 where there are more, calibration error, confusion matrix."""
    found: Fields = {
        "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
        "class_accuracy": MulticlassAccuracy(classes, average="macro", validate_args=False),
        "calibration_error": MulticlassCalibrationError(classes, validate_args=False),
        "confusion": MulticlassConfusionMatrix(classes, validate_args=False),
    }
    if classes > 5:
        found["top5"] = MulticlassAccuracy(classes, average="micro", top_k=5, validate_args=False)
    return MetricCollection(found)
