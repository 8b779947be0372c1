"""Image classification: a timm backbone with a head, any method, cross entropy. Copy this file to start a new task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)
from torchvision.transforms import v2

from mmpeft.errors import ConfigError, DataError
from mmpeft.hosting.recompute import Recompute
from mmpeft.methods.base import Method
from mmpeft.tasks.module import TuningModule
from mmpeft.tasks.predictions import PredictionWriter
from mmpeft.vision.backbone import create, normalisation
from mmpeft.vision.classification.draw import Board


class ImageClassifier(TuningModule):
    """Adapts an image backbone to the classes of the data module.

    Batches are `(images float [B, 3, H, W], labels int64 [B])`; to predict, `(images, identifiers)`.
    """

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        pretrained: bool = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        recompute: Recompute = None,
        compile: bool = False,
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        predictions: str = "predictions.csv",
    ) -> None:
        """
        Args:
            backbone: a timm name, a local folder, or `embedded:<name>`.
            method: what is trained and how; the command line fills it from the key `method`.
            pretrained: whether to load the backbone's weights.
            optimizer: any torch optimiser, given everything that trains.
            warmup: share of all steps with a linear rise of the learning rate; cosine decay to zero follows.
            lr_scheduler: a scheduler in place of warm-up and cosine, stepped after each optimiser step.
            label_smoothing: share of the target spread over all classes.
            mixup: alpha of MixUp; 0 for none.
            cutmix: alpha of CutMix; 0 for none. With both, each batch draws one of the two.
            recompute: what blocks compute again in the backward pass: nothing, `pointwise` operations, or `block`.
            compile: compile every block with torch.compile.
            num_classes: taken from the data module unless there is none.
            model_args: further arguments for the backbone, such as `drop_path_rate`.
            predictions: file that `predict` writes, .csv or .jsonl, inside the run's folder unless absolute.
        """
        super().__init__(method, optimizer, warmup, recompute, compile, lr_scheduler=lr_scheduler)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if min(mixup, cutmix) < 0:
            raise ConfigError(f"mixup and cutmix are alphas of Beta(alpha, alpha) >= 0, got {mixup} and {cutmix}")
        self.backbone, self.pretrained, self.model_args = backbone, pretrained, dict(model_args or {})
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self.num_classes, self.predictions = num_classes, predictions
        self.classes: list[str] = []

    def build(self) -> nn.Module:
        data = getattr(self._trainer, "datamodule", None)
        self.classes = [str(name) for name in getattr(data, "classes", ())]
        count = len(self.classes) or self.num_classes
        if not count or self.num_classes not in (None, count):
            raise ConfigError(
                f"num_classes={self.num_classes}, but {type(data).__name__} has {len(self.classes)} classes"
                if count
                else "give num_classes, or a data module that names its `classes`"
            )
        self.num_classes = count
        self.classes = self.classes or [str(i) for i in range(count)]
        model = create(self.backbone, num_classes=count, pretrained=self.pretrained, **self.model_args)
        size, mean, std = normalisation(model)
        if data is not None:
            data.configure(size, mean, std)
        mixes = [v2.MixUp(alpha=self.mixup, num_classes=count)] if self.mixup else []
        mixes += [v2.CutMix(alpha=self.cutmix, num_classes=count)] if self.cutmix else []
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.metrics = nn.ModuleDict({f"{stage}_metrics": metrics(count, stage) for stage in ("val", "test")})
        self.board = Board(mean, std, self.classes)
        return model

    def configure_callbacks(self) -> list[Callback]:
        """Lightning's hook: what a task brings along."""
        return [*super().configure_callbacks(), PredictionWriter(self.predictions)]

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, [B, classes]."""
        self.prepare()
        assert self.model is not None
        return self.model(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 0:  # every sample comes by once; later epochs need no check
            check_labels(batch[1], self.num_classes or 0)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_labels(batch[1], self.num_classes or 0)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_labels(batch[1], self.num_classes or 0)

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        if index == 0 and self.current_epoch == 0:
            self.board.images(self, images, labels)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        loss = F.cross_entropy(self(images).float(), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss_step", loss, prog_bar=True)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        scores = self(images).float()
        self.metrics[f"{stage}_metrics"].update(scores, labels)
        loss = F.cross_entropy(scores, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(images), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        found = self.metrics[f"{stage}_metrics"].compute()
        self.metrics[f"{stage}_metrics"].reset()
        confusion = found.pop(f"{stage}/confusion")
        self.log_dict(found, prog_bar=True)
        if not self.trainer.sanity_checking:
            self.board.confusion(self, confusion.cpu(), stage)

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], index: int) -> dict[str, Any]:
        """Identifiers and class probabilities of one batch; `PredictionWriter` puts them into a file."""
        images, identifiers = batch
        return {"id": list(identifiers), "probabilities": self(images).float().softmax(-1).cpu()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = checkpoint.get("classes", self.classes)
        if trained != self.classes:
            raise DataError(
                f"the checkpoint was trained on {len(trained)} classes ({', '.join(trained[:5])} …), the data module "
                f"has {len(self.classes)} ({', '.join(self.classes[:5])} …): the outputs would be misread"
            )


def metrics(classes: int, stage: str) -> MetricCollection:
    """Accuracy over samples and over classes, top 5 where there are more, calibration error, confusion matrix."""
    found: dict[str, Any] = {
        "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
        "class_accuracy": MulticlassAccuracy(classes, average="macro", validate_args=False),
        "calibration_error": MulticlassCalibrationError(classes, validate_args=False),
        "confusion": MulticlassConfusionMatrix(classes, validate_args=False),
    }
    if classes > 5:
        found["top5"] = MulticlassAccuracy(classes, average="micro", top_k=5, validate_args=False)
    return MetricCollection(found, prefix=f"{stage}/")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise DataError unless every label is an integer in [0, classes)."""
    if labels.is_floating_point() or labels.dim() != 1:
        raise DataError(f"expected int64 labels [B], got {labels.dtype} {tuple(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} is out of range: the head has {classes} classes, labels are 0 … {classes - 1}; "
            "number the classes from 0 without gaps"
        )
