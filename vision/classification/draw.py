"""What a classification run shows: its first images with their classes, the confusion matrix, accuracy by class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from torch import Tensor

from mmpeft.files import png_of


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


def confusion_png(matrix: Tensor, classes: Sequence[str]) -> bytes:
    """The row-normalised confusion matrix, [classes, classes], as a PNG."""
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
    return png_of(figure)
