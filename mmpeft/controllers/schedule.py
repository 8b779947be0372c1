"""How a budget falls over training."""

from __future__ import annotations


def cubic(step: int, start: float, end: float, first: int, last: int) -> float:
    """`end + (start - end) (1 - p)³` from step `first` to `last`, `start` before, `end` after (arXiv:1710.01878)."""
    progress = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    return end + (start - end) * (1 - progress) ** 3


def linear(step: int, start: float, end: float, first: int, last: int) -> float:
    """`start + (end - start) p` between steps `first` and `last`."""
    progress = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    return start + (end - start) * progress
