"""What a classification run shows in TensorBoard and in its folder: sample images, confusion matrix, class accuracy."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from mmpeft.files import write_atomic
from mmpeft.tasks.publish import folder_of

if TYPE_CHECKING:
    from lightning import LightningModule


class Board:
    """Draws on the process of rank 0; a run without a logger only skips the pictures."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], classes: Sequence[str], most: int = 32) -> None:
        self.mean, self.std, self.classes, self.most = tuple(mean), tuple(std), list(classes), most

    def images(self, module: LightningModule, images: Tensor, labels: Tensor) -> None:
        """The first images of a run as the model gets them, normalisation undone, with their class names."""
        writer = writer_of(module)
        if writer is None:
            return
        few = images[: self.most].detach().float().cpu()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        writer.add_image("train/images", make_grid((few * std + mean).clamp(0, 1), nrow=8), module.global_step)
        names = ", ".join(self.classes[int(label)] for label in labels[: self.most])
        writer.add_text("train/images", names, module.global_step)

    def confusion(self, module: LightningModule, matrix: Tensor, stage: str) -> None:
        """Write `<stage>_classes.csv` (accuracy of each class, what it is taken for) and draw the matrix."""
        folder = folder_of(module.trainer)
        if folder:
            write_atomic(folder / f"{stage}_classes.csv", class_table(matrix, self.classes).encode())
        writer = writer_of(module)
        if writer is not None:
            writer.add_figure(f"{stage}/confusion", confusion_figure(matrix, self.classes), module.global_step)


def writer_of(module: LightningModule) -> Any:
    """TensorBoard's writer, if the run has one and this process writes."""
    if not module.trainer.is_global_zero:
        return None
    found = (logger for logger in module.trainer.loggers if isinstance(logger, TensorBoardLogger))
    return next((logger.experiment for logger in found), None)


def class_table(matrix: Tensor, classes: Sequence[str]) -> str:
    """CSV: class, samples, accuracy, and the class it is most often taken for."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["class", "samples", "accuracy", "most_confused_with"])
    for i, name in enumerate(classes):
        row = matrix[i].clone()
        total, right = int(row.sum()), int(row[i])
        row[i] = 0
        other = classes[int(row.argmax())] if int(row.sum()) else ""
        table.writerow([name, total, f"{right / total:.4f}" if total else "", other])
    return out.getvalue()


def confusion_figure(matrix: Tensor, classes: Sequence[str]) -> Any:
    """A matplotlib figure of the row-normalised confusion matrix, [classes, classes]."""
    from matplotlib.figure import Figure

    share = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(4 + 0.25 * len(classes), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="predicted", ylabel="true", title="share of each true class")
    if len(classes) <= 50:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    return figure
