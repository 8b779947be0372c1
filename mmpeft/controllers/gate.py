"""Gates: how much of a part acts, by the token, by the sequence or everywhere, and how open they are on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmpeft.controllers.base import Controller
from mmpeft.errors import ConfigError

GateKind = Literal["constant", "scalar", "token", "pooled"]
GATES = get_args(GateKind)


class Gate(nn.Module):
    """`g(x)` of x [B, ..., d] with channels last.

    `constant`: `start`. `scalar`: one learned number that starts there. `token`: `σ(w·x_t + b)` for each position.
    `pooled`: its mean over the positions of a row; those that a padding mask names are left out, and without a mask
    all count, padding too. w ~ N(0, .02²), b = 0: both sigmoids start about half open.
    """

    total: Tensor
    seen: Tensor

    def __init__(self, kind: GateKind, width: int, start: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        if kind not in GATES:
            raise ConfigError(f"unknown gate {kind!r}; known: {', '.join(GATES)}")
        self.kind, self.start = kind, start
        if kind == "scalar":
            self.level = nn.Parameter(torch.full((1,), start, device=device, dtype=dtype))
        elif kind != "constant":
            self.linear = nn.Linear(width, 1, device=device, dtype=dtype)
            nn.init.normal_(self.linear.weight, std=0.02)
            nn.init.zeros_(self.linear.bias)
        for name in ("total", "seen"):
            self.register_buffer(name, torch.zeros((), device=device), persistent=False)

    @staticmethod
    def count(kind: GateKind, width: int) -> int:
        """Trainable parameters."""
        return {"constant": 0, "scalar": 1}.get(kind, width + 1)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """[B, ..., 1] by the token, [B, 1, ..., 1] pooled, [1] otherwise; `padding` [B, n] is true where x counts."""
        if self.kind == "constant":
            return x.new_tensor([self.start])
        if self.kind == "scalar":
            g: Tensor = self.level
        else:
            g = torch.sigmoid(self.linear(x))
            places = tuple(range(1, x.dim() - 1))
            if self.kind == "pooled" and places:
                if padding is not None:
                    weight = padding.to(g.dtype).unsqueeze(-1)
                    g = (g * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
                else:
                    g = g.mean(places, keepdim=True)
        if self.training:
            with torch.no_grad():
                self.total += g.mean()
                self.seen += 1
        return g


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
