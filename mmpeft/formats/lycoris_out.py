"""LoHa and LoKr as files of their own: LyCORIS's names in kohya's style, and PEFT folders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmpeft.errors import Refused
from mmpeft.formats.content import Content, Layer
from mmpeft.formats.lycoris import TYPES, layer_of
from mmpeft.formats.peft import PREFIX, exact_targets, folder_of
from mmpeft.formats.peft_out import beside
from mmpeft.parts import Hadamard, Kron, LowRankKron
from mmpeft.parts.factors import Factor
from mmpeft.types import Json

OPTIONS: dict[str, Json] = {
    "LoHa": {"use_effective_conv2d": False},
    "LoKr": {"use_effective_conv2d": False, "decompose_both": False, "decompose_factor": -1},
}
"""What PEFT's configs say beside ranks: how our kernels are split."""


def layer_from(factor: Factor, path: str, weight: Tensor, scale: float) -> Layer | None:
    """The layer of a factor that LyCORIS has too, for a weight [o, i, k...]; None for any other."""
    found = _tensors(factor, weight, scale)
    if not found:
        return None
    layer = layer_of(found, path, Path(path))
    return replace(layer, down=layer.down.view(-1, *weight.shape[1:]), tensors=found)


def _tensors(factor: Factor, weight: Tensor, scale: float) -> dict[str, Tensor]:
    own = {name: tensor.detach() for name, tensor in factor.named_parameters()}
    if isinstance(factor, Hadamard):
        names = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
        found, scaled, rank = {key: own[name] for key, name in names.items()}, "hada_w1_a", len(own["A1"])
    elif isinstance(factor, Kron | LowRankKron) and weight.shape[1] % own["left"].shape[1] == 0:
        found, scaled = {"lokr_w1": own["left"]}, "lokr_w1"
        if isinstance(factor, Kron):
            inner = weight.shape[1] // own["left"].shape[1]
            found["lokr_w2"] = own["right"].view(len(own["right"]), inner, *weight.shape[2:])
            rank = (max(len(own["right"]), inner) + 1) // 2  # the least rank whose second factor is whole
        else:
            found |= {"lokr_w2_a": own["B"], "lokr_w2_b": own["A"]}
            rank = len(own["A"])
    else:
        return {}
    return {**found, scaled: found[scaled] * scale, "alpha": torch.tensor(float(rank))}


def named(layer: Layer, prefix: str) -> dict[str, Tensor]:
    """Tensors by key of a file in kohya's style."""
    return {f"{prefix}.{name}": tensor for name, tensor in layer.tensors.items()}


def folder_files(content: Content, modules: Collection[str], base: Json | None) -> dict[str, bytes]:
    """Names and bytes of a PEFT folder of type LOHA or LOKR.

    Raises:
        Refused: there are other layers, or rows of tables, beside those of one such factor.
    """
    kinds = {layer.factor if layer.tensors else "LoRA" for layer in content.layers}
    if len(kinds) > 1 or content.words or content.shifts:
        what = " and ".join(sorted(kinds)) if len(kinds) > 1 else "rows of tables or new biases"
        raise Refused(f"a PEFT folder holds one kind of layer; here are {what}. Use format='kohya' or tuning.save()")
    (kind,) = kinds
    (name,) = (name for name, known in TYPES.items() if known == kind)
    tensors = {
        f"{PREFIX}{layer.path}.{key}": tensor
        for layer in content.layers
        for key, tensor in layer.tensors.items()
        if key != "alpha"
    }
    targets = exact_targets([layer.path for layer in content.layers], modules)
    tensors |= beside(content, {layer.path for layer in content.layers})
    saved = sorted(content.whole) or None
    fields = {
        "peft_type": name,
        "target_modules": targets,
        "modules_to_save": saved,
        **_ranks(content.layers),
        **OPTIONS[kind],
    }
    return folder_of(tensors, fields, base)


def _ranks(layers: Sequence[Layer]) -> Json:
    """Rank and alpha, equal because the scale is in the tensors, and the layers that have another one."""
    ranks = {layer.path: int(layer.tensors["alpha"]) for layer in layers}
    rank, _ = Counter(ranks.values()).most_common(1)[0]
    others = {f"^{re.escape(path)}": own for path, own in ranks.items() if own != rank}
    return {"r": rank, "alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}
