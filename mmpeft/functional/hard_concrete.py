"""The hard-concrete distribution: random gates in [0, 1] that are exactly 0 or 1 with positive probability."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LOW, HIGH = -1.5, 1.5


def hard_concrete(alpha: Float[Tensor, ...], noise: Float[Tensor, ...] | float = 0.0) -> Float[Tensor, ...]:
    """`z = clamp(σ(α + noise) (h - l) + l, 0, 1)` with l = -1.5, h = 1.5 (Louizos et al. 2018, arXiv:1712.01312).

    `noise` is `logit(u)`, u uniform; 0 is the gate at rest.
    """
    return (torch.sigmoid(alpha + noise) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def open_probability(alpha: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """`P(z > 0) = σ(α - log(-l / h))`, the expected L0 norm of a gate."""
    return torch.sigmoid(alpha - math.log(-LOW / HIGH))


def logistic_noise(out: Float[Tensor, ...], generator: torch.Generator) -> Float[Tensor, ...]:
    """`logit(u)` with u ~ U(1e-4, 1 - 1e-4), in place."""
    return out.uniform_(1e-4, 1 - 1e-4, generator=generator).logit_()
