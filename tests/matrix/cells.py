"""The cells of the matrix: every registered method, with settings that make a tiny model move, times every family."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.methods import METHODS, Method
from mmpeft.methods.additive.adapter_fusion import AdapterFusion
from tests.matrix.example import Example
from tests.matrix.families import FAMILIES

VARIANTS: dict[str, list[dict[str, object]]] = {
    "VPT": [{}, {"deep": True}],
    "LoRA": [{}, {"at": "mlp.*,embed"}],
    "CoOp": [{}, {"depth": 2}],
}
"""Further settings of a method worth a row of their own."""

ALIKE = ("PaFi", "RandomMask", "SAMMask", "LTSFT", "ChildTuningD")
"""Methods whose parts are those of `FishMask`."""

SMALL: dict[str, object] = {"bottleneck": 8, "tokens": 3, "rank": 2, "target": 1, "hidden": 16}
SMALL |= {
    "reduction": 2,
    "epsilon": 0.3,
    "density": 0.02,
    "samples": 2,
    "batches": 1,
    "steps": 1,
    "budget": "5%",
    "words": 40,
}

FUSED = mmpeft.Pfeiffer(bottleneck=8)
"""The method of the adapters that are saved for a fusion."""

WRAPPED: dict[str, dict[str, object]] = {
    "AdapterDrop": {"method": FUSED},
    "AdapterFusion": {"adapters": ()},  # saved by `library` for each model
}
"""Methods around others, and which."""


def decided(example: Example, method: Method) -> Method:
    """The method with everything decided that batches or saved adapters decide, by the example's own batch."""
    if method.decided:
        return method
    if isinstance(method, AdapterFusion):
        with TemporaryDirectory() as folder:
            return replace(method, adapters=library(example.model, folder)).resolve(example.model)

    def loss(model: nn.Module, batch: object) -> Tensor:
        y = example(model, batch)
        return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).square().mean()

    return method.resolve(example.model, [example.batch], loss)


def library(model: nn.Module, folder: str) -> list[str]:
    """Two saved adapters of the model, far from their start."""
    for seed in (0, 1):
        tuning = mmpeft.attach(model, FUSED)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuning.parameters():
                parameter.normal_(std=0.1, generator=generator)
        tuning.save(f"{folder}/{seed}")
        tuning.detach()
    return [f"{folder}/{seed}" for seed in (0, 1)]


@dataclass(frozen=True)
class Cell:
    method: Method = field(compare=False)  # its options may be unhashable
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
