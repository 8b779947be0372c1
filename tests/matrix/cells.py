"""The cells of the matrix: every registered method, with settings that make a tiny model move, times every family."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.methods import METHODS, Method
from tests.matrix.example import Example
from tests.matrix.families import FAMILIES

VARIANTS: dict[str, list[dict[str, object]]] = {"VPT": [{}, {"deep": True}], "LoRA": [{}, {"at": "mlp.*,embed"}]}
"""Further settings of a method worth a row of their own."""

ALIKE = ("PaFi", "RandomMask", "SAMMask", "LTSFT", "ChildTuningD")
"""Methods whose parts are those of `FishMask`."""

SMALL: dict[str, object] = {"bottleneck": 8, "tokens": 3, "rank": 2, "target": 1, "hidden": 16, "reduction": 2, "epsilon": 0.3}
SMALL |= {"density": 0.02, "samples": 2, "batches": 1, "steps": 1, "budget": "5%"}


WRAPPED: dict[str, dict[str, object]] = {"AdapterDrop": {"method": mmpeft.Pfeiffer(bottleneck=8)}}
"""Methods around another one, and which."""


def decided(example: Example, method: Method) -> Method:
    """The method with everything decided that batches decide, by the example's own batch."""
    if method.decided:
        return method

    def loss(model: nn.Module, batch: object) -> Tensor:
        y = example(model, batch)
        return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).square().mean()

    return method.resolve(example.model, [example.batch], loss)


@dataclass(frozen=True)
class Cell:
    method: Method
    family: str
    label: str

    def __str__(self) -> str:
        return f"{self.label}-{self.family}"


def rows() -> dict[str, Method]:
    """Label -> method, for every registered method; dropout off, so that passes can be compared."""
    found: dict[str, Method] = {}
    for name, cls in sorted(METHODS.items()):
        if name == "Plan":  # what the methods that choose by data become
            continue
        names = {f.name for f in fields(cls)}
        still = {key: 0.0 for key in ("dropout", "drop_path") if key in names}
        small = {key: value for key, value in SMALL.items() if key in names}
        for extra in VARIANTS.get(name, [{}]):
            label = name + "".join(f"[{key}={value}]" for key, value in extra.items())
            found[label] = cls(**{**still, **small, **WRAPPED.get(name, {}), **extra})
    found["LoRA+BitFit+Houlsby"] = mmpeft.LoRA(rank=2) + mmpeft.BitFit() + mmpeft.Houlsby(bottleneck=8)
    found["DoRA[where]"] = mmpeft.DoRA(rank=2, at="attn.*|mlp.*").where("depth>=1")
    return found


CELLS = [Cell(method, family, label) for label, method in rows().items() for family in FAMILIES]
