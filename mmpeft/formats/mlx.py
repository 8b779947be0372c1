"""MLX folders, as `mlx_lm` trains and reads them: `adapters.safetensors` beside `adapter_config.json`.

    lora    W + s (A B)ᵀ: `<module>.lora_a` [i, r], `.lora_b` [r, o]; one rank, and one factor s (no alpha) for all
    dora    m ⊙ (W + s (A B)ᵀ) / ‖W + s (A B)ᵀ‖, with `<module>.m` [o] beside them
    full    tensors of the base by name

A table of words has `lora_a` [words, r] and `lora_b` [r, d]; where the head is the same table, it changes with it.
Weights of linears are [o, i], whatever the model here has. https://github.com/ml-explore/mlx-lm
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, nearest
from mmpeft.formats.content import Content, Layer, assemble, read_json, read_tensors
from mmpeft.formats.low_rank import tunable_sites
from mmpeft.formats.tails import module_of
from mmpeft.formats.tensors import names_of_one
from mmpeft.hosting.modules import CHILD
from mmpeft.types import Facts

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
TYPES = ("lora", "dora", "full")
SLOTS = {"lora_a": "down", "lora_b": "up", "m": "magnitude"}


def is_config(config: Facts) -> bool:
    """Whether a config is one of `mlx_lm`'s."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def read_folder(folder: Path) -> Content:
    """The adapter in a folder of `mlx_lm`; modules keep the names that they have there.

    Raises:
        AdapterFileError: incomplete, of another type, or with updates of stacked experts.
    """
    config = read_json(folder / CONFIG)
    kind = str(config.get("fine_tune_type", "lora"))
    if kind not in TYPES:
        raise AdapterFileError(
            f"{folder / CONFIG}: fine_tune_type {kind!r} is not read; supported: {', '.join(TYPES)}."
            f"{nearest(kind, TYPES)}"
        )
    if (folder / "adapters.npz").exists() and not (folder / WEIGHTS).exists():
        raise AdapterFileError(
            f"{folder} holds adapters.npz of an early mlx_lm; save it as safetensors: "
            "mx.save_safetensors('adapters.safetensors', mx.load('adapters.npz'))"
        )
    tensors, _ = read_tensors(folder / WEIGHTS)
    if kind == "full":
        for name, tensor in tensors.items():
            if tensor.dim() > 2:
                raise AdapterFileError(f"{folder}: {name} is {list(tensor.shape)}; {OTHERWISE}")
        return Content("mlx", base=tensors)
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        if name not in SLOTS or not path:
            raise AdapterFileError(f"{folder / WEIGHTS}: {key!r} is no part of a {kind} update; mlx_lm refuses it too")
        if tensor.dim() > 2:
            raise AdapterFileError(
                f"{folder}: {key} is {list(tensor.shape)}, an update of stacked experts; {OTHERWISE}"
            )
        slots.setdefault(path, {})[SLOTS[name]] = tensor if name == "m" else tensor.mT
    scale, rank, dropout = _parameters(config, folder / CONFIG)
    return Content(
        "mlx", [_layer(own, path, scale, rank, kind, folder) for path, own in slots.items()], dropout=dropout
    )


OTHERWISE = (
    "mlx_lm keeps stacks and kernels under other names and in another order than transformers does: write the whole "
    "model with `mlx_lm.fuse`"
)


def _parameters(config: Facts, where: Path) -> tuple[float, int, float]:
    """Scale, rank and dropout that hold for all layers."""
    own = config.get("lora_parameters")
    own = own if isinstance(own, dict) else {}
    scale: object = own.get("scale")
    rank: object = own.get("rank")
    dropout: object = own.get("dropout", 0.0)
    if not (_number(scale) and _number(rank) and _number(dropout)):
        raise AdapterFileError(
            f"{where}: lora_parameters has rank {rank!r}, scale {scale!r} and dropout {dropout!r}; expected numbers "
            "(the factor is called scale there, not alpha)"
        )
    return float(scale), int(rank), float(dropout)


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layer(own: Mapping[str, Tensor], path: str, scale: float, rank: int, kind: str, folder: Path) -> Layer:
    if ("magnitude" in own) != (kind == "dora"):
        have = "has" if "magnitude" in own else "lacks"
        raise AdapterFileError(f"{folder}: {path} {have} lengths `m`, and fine_tune_type is {kind!r}; they do not fit")
    lengths = own.get("magnitude")
    if lengths is not None and {"down", "up"} <= set(own):
        words, width = own["down"].shape[-1], own["up"].shape[0]
        if lengths.numel() == words != width:
            raise AdapterFileError(
                f"{folder}: {path} has one DoRA length for each of {words} words; DoRA has none of tables here"
            )
    layer = assemble(own, path, folder)
    if layer.rank != rank:
        raise AdapterFileError(
            f"{folder}: {path} has rank {layer.rank}, its config says {rank}; the files belong to different adapters"
        )
    return replace(layer, alpha=scale * layer.rank).trimmed()


# -- by a model ---------------------------------------------------------------------------------------------


def named(content: Content, model: nn.Module, where: object) -> Content:
    """A folder's content by the model's own module paths, orders of dimensions and tied tables.

    Raises:
        AdapterFileError: an update of a head whose table the model shares.
    """
    modules = [name for name, _ in model.named_modules() if CHILD not in name.split(".")]
    tables, linears = tunable_sites(model, ("embedding",)), tunable_sites(model, ("linear",))
    turned = {path for path, own in linears.items() if own[0].transposed}
    shared = {name: names for names in names_of_one(model).values() for name in names}
    layers: list[Layer] = []
    for layer in content.layers:
        path = module_of(layer.path, modules)
        if path not in tables:
            layers.append(replace(layer, path=path, transposed=path in turned))
            continue
        layers.append(replace(layer, path=path, lookup=True, transposed=True))
        for other in shared[f"{path}.weight"]:
            head = other.rpartition(".")[0]
            if head != path:
                layers.append(replace(layer, path=head, down=layer.up.mT, up=layer.down.mT))
    base: dict[str, Tensor] = {}
    for name, tensor in content.base.items():
        path, _, own = name.rpartition(".")
        path = module_of(path, modules)
        value = tensor.mT if own == "weight" and path in turned else tensor
        base |= dict.fromkeys(shared.get(f"{path}.{own}", [f"{path}.{own}"]), value)
    return replace(content, layers=layers, base=base)
