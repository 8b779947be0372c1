"""Training on a random part of every gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmpeft.controllers.base import Controller


class DropGradients(Controller):
    """`g ← g ⊙ m / p` before each step, `m ~ Bernoulli(p)` drawn anew; the same `m` on every process."""

    def __init__(self, parameters: Sequence[nn.Parameter], p: float) -> None:
        self.parameters, self.p = list(parameters), p

    def before_step(self, step: int) -> None:
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None and self.p < 1:
                generator = torch.Generator(parameter.device).manual_seed(step * 1_000_003 + i)
                keep = torch.empty_like(parameter.grad).bernoulli_(self.p, generator=generator)
                parameter.grad.mul_(keep).div_(self.p)
