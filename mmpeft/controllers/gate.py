"""How open gates are on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmpeft.controllers.base import Controller
from mmpeft.parts.gate import Gate


class GateLevels(Controller):
    """Logs how open the gates of each kind of part are: means over the micro-batches of the last step."""

    def __init__(self, gates: Mapping[str, Sequence[Gate]]) -> None:
        self.gates, self.step = gates, -1

    def before_forward(self, step: int) -> None:
        if step != self.step:
            self.step = step
            for gate in (gate for gates in self.gates.values() for gate in gates):
                gate.total.zero_()
                gate.seen.zero_()

    def values(self) -> dict[str, Tensor]:
        return {
            f"gate_{kind}": torch.stack([gate.total / gate.seen.clamp_min(1) for gate in gates]).mean()
            for kind, gates in self.gates.items()
        }
