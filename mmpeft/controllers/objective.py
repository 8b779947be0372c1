"""Terms of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.controllers.base import Controller
from mmpeft.parts.fusion import FusedAdapters


class NearIdentity(Controller):
    """AdapterFusion: `λ Σ ‖I - W_v‖²`, so that W_v mixes adapters before it changes them."""

    def __init__(self, parts: Sequence[FusedAdapters], weight: float) -> None:
        self.parts, self.weight = list(parts), weight

    def penalty(self) -> Tensor:
        return self.weight * torch.stack([part.distance() for part in self.parts]).sum()
