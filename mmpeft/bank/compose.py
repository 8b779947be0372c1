"""Several linear entries as one: the sum of their updates, written as a LoRA again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmpeft.errors import ConfigError, Refused
from mmpeft.functional.rows import Rows
from mmpeft.methods.reparameterized.lora import LoRA
from mmpeft.parts import Delta, LowRank
from mmpeft.parts.base import Placement
from mmpeft.surgery.together import not_linear


@dataclass
class _Sum:
    """The weighted updates of one range of rows of one weight."""

    shape: tuple[int, int]
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dense: Tensor | None = None

    def add(self, part: Delta, weight: float) -> None:
        scale = part.scale * weight
        if isinstance(part.factor, LowRank):
            down, up = part.factor.pair()
            self.pairs.append((down.detach().float(), up.detach().float() * scale))
        else:
            delta = part.factor.materialise().detach().float().view(self.shape) * scale
            self.dense = delta if self.dense is None else self.dense + delta

    def pair(self) -> tuple[Tensor, Tensor]:
        """`A` [r, i] and `B` [o, r]: side by side while that is smaller, else of rank min(o, i), always exact."""
        rows, columns = self.shape
        rank = sum(len(down) for down, _ in self.pairs)
        if self.dense is None and rank <= min(rows, columns):
            return torch.cat([down for down, _ in self.pairs]), torch.cat([up for _, up in self.pairs], dim=1)
        delta = sum((up.double() @ down.double() for down, up in self.pairs), start=torch.zeros(rows, columns).double())
        if self.dense is not None:
            delta = delta + self.dense.to(delta.device)
        delta = delta.float()
        eye = torch.eye(min(rows, columns), device=delta.device)
        return (eye, delta) if columns <= rows else (delta, eye)


def summed(tunings: Sequence[Sequence[Placement]], weights: Sequence[float]) -> tuple[LoRA, dict[str, Tensor]]:
    """The LoRA that computes `Σ w_i ΔW_i`, and its tensors by `<home>.<key>.<name>`.

    Its rank at a weight [o, i] is at most min(o, i), so folding more and more entries takes no more memory.

    Raises:
        Refused: a part is not linear; the message has the reason.
    """
    if len(weights) != len(tunings):
        raise ConfigError(f"got {len(weights)} weights for {len(tunings)} entries")
    sums: dict[tuple[str, str, Rows | None], _Sum] = {}
    for placements, weight in zip(tunings, weights):
        for p in placements:
            reason = not_linear(p.part)
            if reason:
                raise Refused(f"{type(p.part).__name__} at {p.home or 'the model'} cannot be merged: {reason}")
            assert isinstance(p.part, Delta)
            if p.part.lookup or p.hooks[0].kind == "exit":
                raise Refused(
                    f"the update of {p.home}, no linear, is not merged; merge linears alone (at='attn.*|mlp.*')"
                )
            weight_shape = p.part.factor.materialise().shape
            shape = (int(weight_shape[0]), int(weight_shape[1:].numel()))
            sums.setdefault((p.home, p.role, p.part.rows), _Sum(shape)).add(p.part, weight)
    pairs = {key: own.pair() for key, own in sums.items()}
    ranks = {f"{role} & path={home}": len(down) for (home, role, _), (down, _) in pairs.items()}
    tensors = {}
    for (home, role, _), (down, up) in pairs.items():
        for name, tensor in (("A", down), ("B", up)):
            tensors[f"{home}.{role}.{name}"] = tensor
    top = max(ranks.values())
    return LoRA("|".join(ranks), top, float(top), rank_pattern=ranks, alpha_pattern=ranks), tensors


def fill(placements: Sequence[Placement], tensors: dict[str, Tensor]) -> None:
    """Set the parts of the LoRA that `summed` described."""
    with torch.no_grad():
        for p in placements:
            assert isinstance(p.part, Delta)
            assert isinstance(p.part.factor, LowRank)
            p.part.factor.A.copy_(tensors[f"{p.home}.{p.role}.A"])
            p.part.factor.B.copy_(tensors[f"{p.home}.{p.role}.B"])
