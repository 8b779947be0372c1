"""What is left of a tuning without all that only training needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmpeft.methods.base import Method
from mmpeft.methods.former import place
from mmpeft.methods.placed import Tensors
from mmpeft.parts.base import Placement
from mmpeft.sites import sites
from mmpeft.surgery.attaching import attach, detach
from mmpeft.surgery.choice import use
from mmpeft.surgery.transaction import unchanged_on_error

if TYPE_CHECKING:
    from mmpeft.surgery.attached import Attached


@torch.no_grad()
def bake(tuning: Attached) -> None:
    """Put what is left in the tuning's place; answers stay the same."""
    found = _left(tuning)
    if found is not None:
        with unchanged_on_error(tuning.model):
            _replace(tuning, *found)


def _left(tuning: Attached) -> tuple[Method, Tensors] | None:
    """A method and its tensors in the tuning's place; None where everything is left."""
    left = tuning._state.bakes[tuning.name]
    return left() if left is not None else None


def _replace(tuning: Attached, method: Method, values: Tensors) -> None:
    """Another method in the place of a tuning's, its parts with these values."""
    route = tuning._state.route
    detach(tuning.model, tuning.name)
    attach(tuning.model, method, tuning.name)
    for placement, own in zip(tuning.placements, values, strict=True):
        for name, tensor in {**dict(placement.part.named_parameters()), **placement.part.frozen()}.items():
            tensor.copy_(own[name])
    use(tuning.model, route)


def compact(tuning: Attached) -> tuple[Method, dict[str, Tensor], list[Placement]]:
    """The method, tensors and parts that `bake` would leave, beside the tuning as it is."""
    left = _left(tuning)
    if left is None:
        return tuning.method, tuning.state_dict(), tuning.placements
    method, tensors = left
    placements = list(place(method, tuning.model, sites(tuning.model)))
    found = {}
    for placement, own in zip(placements, tensors, strict=True):
        found.update({f"{placement.prefix}.{name}": tensor.detach() for name, tensor in own.items()})
    return method, found, placements
