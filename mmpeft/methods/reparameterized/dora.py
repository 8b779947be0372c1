"""DoRA: LoRA for the direction of each weight row, a vector for its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.methods.base import register
from mmpeft.methods.reparameterized.lora import LoRA


@register("https://arxiv.org/abs/2402.09353", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class DoRA(LoRA):
    """`W' = m ⊙ (W + s BA) / ‖W + s BA‖` row by row, `m` starting at `‖W‖`, no gradient through the norm.

    Needs about half of LoRA's learning rate; `α = 2r` by default. Parameters: `r (i + o) + o` a site.
    """

    rank: int = 16
    alpha: float = 32.0
    magnitude: ClassVar[bool] = True
