"""Tensors away from their start, so that no test passes on a part that does nothing yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import mmpeft

T = TypeVar("T", bound=Any)
"""A tuning, or what has parameters like one."""


def add_noise(tensors: Iterable[Tensor], by: float = 0.1, seed: int = 1) -> None:
    """Move tensors by noise of this size, the same for the same seed; the random state stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * by)


def redraw(tensors: Iterable[Tensor], by: float = 0.1, seed: int = 1) -> None:
    """Draw tensors anew, so that they are the same wherever they came from."""
    tensors = list(tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    add_noise(tensors, by, seed)


def perturb(tuning: T, seed: int = 1, by: float = 0.05) -> T:
    """Move every trainable tensor of a tuning by noise."""
    add_noise(tuning.parameters(), by, seed)
    return tuning


def attach_moved(
    model: nn.Module, method: mmpeft.Method, name: str = "default", by: float = 0.1, seed: int = 1
) -> mmpeft.Tuning:
    """Attach a method, and move its tensors by noise."""
    return perturb(mmpeft.attach(model, method, name), seed, by)
