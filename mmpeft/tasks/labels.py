"""Labels of a batch, checked before a loss misreads them."""

from __future__ import annotations

from torch import Tensor

from mmpeft.errors import DataError


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise DataError unless every label is an integer in [0, classes)."""
    if labels.is_floating_point() or labels.dim() != 1:
        raise DataError(f"expected int64 labels [B], got {labels.dtype} {tuple(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} is out of range: there are {classes} classes, labels are 0 … {classes - 1}; "
            "number the classes from 0 without gaps"
        )
