"""Tunings away from their start, so that no test passes on a part that does nothing yet."""

from __future__ import annotations

import torch

import mmpeft


def perturb(tuning: mmpeft.Tuning, seed: int = 1, by: float = 0.05) -> None:
    """Move every trainable tensor by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
