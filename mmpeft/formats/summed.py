"""Several low-rank updates as one: a weighted sum that needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmpeft.errors import Refused
from mmpeft.formats.content import Content, Layer


def weighted_sum(contents: Mapping[Path, Content], weights: Sequence[float]) -> Content:
    """`ΔW = Σ_k w_k s_k up_k down_k` for each layer: halves side by side, w_k and s_k in `up`; rank Σ_k r_k.

    Raises:
        Refused: a file holds DoRA, which is no sum, or anything beside low-rank updates.
    """
    found: dict[tuple[str, str], list[Layer]] = {}
    for (path, content), weight in zip(contents.items(), weights):
        for layer in _plain(content, path):
            up = layer.up.float() * (layer.scale * weight)
            plain = replace(layer, down=layer.down.float(), up=up, alpha=None, factor="", tensors={})
            found.setdefault((layer.component, layer.path), []).append(plain)
    return Content("sum", [_joined(layers) for layers in found.values()])


def _plain(content: Content, path: Path) -> list[Layer]:
    """The layers of a file that holds low-rank updates alone."""
    strange = [
        name
        for name, held in (
            (content.beside, content.beside),
            ("differences", content.shifts),
            ("updates of experts", content.stacks),
            ("learned tokens", content.learned),
            ("updates that depend on the base", content.based),
        )
        if held
    ]
    if any(layer.magnitude is not None for layer in content.layers):
        strange.append("DoRA magnitudes")
    if strange or not content.layers:
        raise Refused(
            f"{path} holds {' and '.join(strange) or 'no low-rank update'}; a weighted sum in one file is of low-rank "
            "updates (LoRA, LoHa, LoKr). With a model, mmpeft.Together runs other adapters side by side"
        )
    return content.layers


def _joined(layers: Sequence[Layer]) -> Layer:
    """One update with the halves of all; raises Refused where their shapes differ."""
    shapes = {(layer.down.shape[1:], layer.up.shape[0]) for layer in layers}
    if len(shapes) > 1:
        raise Refused(
            f"{layers[0].path}: the files have updates of different shapes there: "
            + " and ".join(f"{list(layer.down.shape)} with {list(layer.up.shape)}" for layer in layers)
        )
    down, up = torch.cat([layer.down for layer in layers]), torch.cat([layer.up for layer in layers], 1)
    return replace(layers[0], down=down, up=up)
