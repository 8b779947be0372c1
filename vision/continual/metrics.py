"""Metrics of continual learning from an accuracy matrix R: R[t, i] on task i after training task t, 0 ≤ i ≤ t.

Entries above the diagonal are NaN unless tasks were evaluated before they were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, DataError

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """`curve` is A_b, accuracy on all classes seen after each task; `average` Ā its mean, `last` its end."""

    curve: tuple[float, ...]
    average: float
    last: float
    forgetting: float
    backward: float
    forward: float | None


def checked(matrix: Sequence[Sequence[float]] | Matrix) -> Matrix:
    """The matrix as float64.

    Raises:
        DataError: not square, empty, or a value on or below the diagonal is no accuracy.
    """
    found = np.asarray(matrix, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not len(found):
        raise DataError(f"expected a square accuracy matrix [tasks, tasks], got {found.shape}")
    below = found[np.tril_indices(len(found))]
    if not ((below >= 0) & (below <= 1)).all():
        raise DataError("accuracies on and below the diagonal must lie in [0, 1]")
    return found


def curve(matrix: Matrix, counts: Sequence[int]) -> Matrix:
    """`A_b = Σ_{i≤b} n_i R_bi / Σ_{i≤b} n_i`, with n_i test samples of task i."""
    if len(counts) != len(matrix) or min(counts) < 1:
        raise ConfigError(f"expected the number of test samples of each of {len(matrix)} tasks, got {list(counts)}")
    n = np.asarray(counts, dtype=np.float64)
    return np.array([matrix[b, : b + 1] @ n[: b + 1] / n[: b + 1].sum() for b in range(len(matrix))])


def forgetting(matrix: Matrix) -> float:
    """`mean_{i<T} (max_t R_ti − R_Ti)`; 0 for one task."""
    last = len(matrix) - 1
    drops = [matrix[i:, i].max() - matrix[last, i] for i in range(last)]
    return float(np.mean(drops)) if drops else 0.0


def backward_transfer(matrix: Matrix) -> float:
    """BWT, `mean_{i<T} (R_Ti − R_ii)`; 0 for one task."""
    last = len(matrix) - 1
    moves = [matrix[last, i] - matrix[i, i] for i in range(last)]
    return float(np.mean(moves)) if moves else 0.0


def forward_transfer(matrix: Matrix, chance: Sequence[float]) -> float | None:
    """FWT, `mean_{i≥2} (R_{i−1,i} − rand_i)`; None where tasks were not evaluated ahead."""
    ahead = [matrix[i - 1, i] - chance[i] for i in range(1, len(matrix))]
    return float(np.mean(ahead)) if ahead and np.isfinite(ahead).all() else None


def summary(
    matrix: Sequence[Sequence[float]] | Matrix, counts: Sequence[int], chance: Sequence[float] | None = None
) -> Summary:
    """All metrics of one run."""
    found = checked(matrix)
    points = curve(found, counts)
    ahead = None if chance is None else forward_transfer(found, chance)
    return Summary(
        tuple(map(float, points)),
        float(points.mean()),
        float(points[-1]),
        forgetting(found),
        backward_transfer(found),
        ahead,
    )
