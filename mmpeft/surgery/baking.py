"""What is left of a tuning without all that only training needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmpeft.methods.base import Method
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
    method, tensors = tuning.method.compact(tuning.placements)
    if method is not tuning.method:
        with unchanged_on_error(tuning.model):
            _replace(tuning, method, tensors)


def _replace(tuning: Attached, method: Method, values: list[dict[str, Tensor]]) -> None:
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
    method, tensors = tuning.method.compact(tuning.placements)
    if method is tuning.method:
        return method, tuning.state_dict(), tuning.placements
    placements = method.place(tuning.model, sites(tuning.model))
    found = {}
    for placement, own in zip(placements, tensors, strict=True):
        prefix = ".".join(filter(None, (placement.home, placement.key)))
        found.update({f"{prefix}.{name}": tensor.detach() for name, tensor in own.items()})
    return method, found, placements
