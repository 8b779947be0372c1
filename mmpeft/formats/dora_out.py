"""DoRA for readers that have another formula of it, or none.

    trained here, in LyCORIS and PEFT    m ⊙ (W + ΔW) / ‖W + ΔW‖
    ComfyUI's                            m ⊙ (W + ΔW) / ‖W‖

`comfy` writes `m ‖W‖ / ‖W + ΔW‖`, with which ComfyUI's is the trained one at strength 1. `difference` writes the full
difference of the weight, which is the same at every reader that knows one; `low_rank` its best approximation by few
ranks, which every reader knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.formats.content import Layer
from mmpeft.formats.forms import FORMS
from mmpeft.formats.low_rank import delta_weights
from mmpeft.formats.lycoris import multiplied
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at


def written(
    layers: Sequence[Layer], model: nn.Module, form: str, format: str, rank: int = 0
) -> tuple[list[Layer], str]:
    """Layers with their DoRA in another form, and what is to be said of it.

    `rank` is that of `low_rank`, 0 for four times each layer's own.

    Raises:
        ConfigError: no such form. Refused: a format whose readers have another formula than ComfyUI's.
    """
    if form not in FORMS:
        raise ConfigError(f"dora={form!r}; known: {', '.join(filter(None, FORMS))}, or nothing for DoRA as it trained")
    own = [layer for layer in layers if layer.magnitude is not None]
    if not form or not own:
        return list(layers), ""
    if form == "comfy":
        if format not in ("kohya", "comfy"):
            raise Refused(f"dora='comfy' is for files that ComfyUI reads, format='kohya' or 'comfy', not {format!r}")
        made = {layer.path: _for_comfy(layer, model) for layer in own}
        said = "DoRA is written with ComfyUI's lengths: exact there at strength 1 only, wrong in other programs"
    else:
        deltas = delta_weights(own, model)
        if form == "difference":
            made = {layer.path: _difference(layer, deltas[layer.path]) for layer in own}
            said = f"{len(own)} DoRA layers are written as the full differences of their weights"
        else:
            ranks = {layer.path: rank or 4 * layer.rank for layer in own}
            made = {layer.path: _low_rank(layer, deltas[layer.path], ranks[layer.path]) for layer in own}
            square = sum(float(delta.square().sum()) for delta in deltas.values())
            after = delta_weights(list(made.values()))
            off = sum(float((after[path].view_as(delta) - delta).square().sum()) for path, delta in deltas.items())
            said = (
                f"{len(own)} DoRA layers are written as LoRA of a rank up to {max(ranks.values())}, with a relative "
                f"error of {(off / square) ** 0.5:.2g} in what they change; dora='difference' has none"
            )
    return [made.get(layer.path, layer) for layer in layers], said


def _for_comfy(layer: Layer, model: nn.Module) -> Layer:
    assert layer.magnitude is not None
    return replace(layer, magnitude=layer.magnitude.float() / growth(layer, _weight(layer, model)))


def growth(layer: Layer, weight: Tensor) -> Tensor:
    """`‖W + ΔW‖ / ‖W‖` of each row."""
    delta = delta_weights([replace(layer, magnitude=None)])[layer.path].flatten(1)
    weight = weight.detach().float().flatten(1)
    found: Tensor = (weight + delta.to(weight)).norm(dim=1) / weight.norm(dim=1)
    return found


def _weight(layer: Layer, model: nn.Module) -> Tensor:
    weight: Tensor = base_value(module_at(model, layer.path), "weight")
    return weight.T if layer.transposed else weight


def _difference(layer: Layer, delta: Tensor) -> Layer:
    down, up = multiplied(delta)
    whole = {"diff": delta}
    return replace(
        layer, down=down, up=up, alpha=float(len(down)), magnitude=None, factor="full difference", tensors=whole
    )


def _low_rank(layer: Layer, delta: Tensor, rank: int) -> Layer:
    u, s, v = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    down = (root[:, None] * v[:rank]).float().view(rank, *delta.shape[1:])
    up = (u[:, :rank] * root).float()
    return replace(layer, down=down, up=up, alpha=float(rank), magnitude=None)
