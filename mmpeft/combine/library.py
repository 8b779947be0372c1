"""Saved adapters as material: read with every check that loading makes, and not left on the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft.formats.native import load
from mmpeft.methods.base import Method
from mmpeft.parts.base import Placement
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.tuning import Tuning


@dataclass(frozen=True)
class Adapter:
    """A trained adapter apart from any model: its method, its parts where they stood, and their tensors."""

    where: str
    method: Method
    placements: list[Placement]
    tensors: dict[str, Tensor]


def borrow(model: nn.Module, source: str | Path | Tuning) -> Adapter:
    """An adapter from a folder, made for this very model, or from a tuning; the model stays as it is.

    Raises:
        AdapterFileError: no adapter folder, a damaged one, or one made for another base.
    """
    if isinstance(source, Tuning):
        return Adapter(source.name, source.method, source.placements, source.state_dict())
    random = torch.get_rng_state()
    with unchanged_on_error(model):
        tuning = load(model, source, "borrowed", run=False)
        found = Adapter(str(source), tuning.method, tuning.placements, tuning.state_dict())
        tuning.detach()
        torch.set_rng_state(random)
    return found
