"""Which layers' parts run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from mmpeft.controllers.base import Controller
from mmpeft.parts.base import Placement


class RandomLayers(Controller):
    """AdapterDrop: in each step the parts of the first `n ~ U{0, …, most}` blocks rest; between steps all of them run.

    The draw depends on the step alone: the same for every process, micro-batch and recomputation.
    """

    replans: ClassVar[bool] = True

    def __init__(self, placements: Sequence[Placement], most: int) -> None:
        self.placements, self.most = list(placements), most

    def before_forward(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        rest_below(self.placements, int(torch.randint(0, self.most + 1, (), generator=generator)))

    def after_step(self, step: int) -> None:
        rest_below(self.placements, 0)


def rest_below(placements: Sequence[Placement], layers: int) -> None:
    """Let the parts of the first `layers` blocks rest and all others run; takes effect when hosts plan anew."""
    for placement in placements:
        placement.part.resting = 0 <= placement.depth < layers
