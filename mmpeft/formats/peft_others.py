"""PEFT folders of the types whose tensors are a low-rank update, a norm, or rows of a table under other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpeft.errors import AdapterFileError
from mmpeft.formats.content import Content, Layer
from mmpeft.types import Facts

ADALORA, VERA, NORMS, WORDS = TYPES = ("ADALORA", "VERA", "LN_TUNING", "TRAINABLE_TOKENS")
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B", "vera_A", "vera_B")
ROWS, NORM = ".trainable_tokens_delta", ".ln_tuning_layers."
RANKNUM = 1e-5
"""What PEFT adds to the rank that divides alpha."""

Found = tuple[Content, dict[str, Tensor]]
"""The content, and the tensors that are no part of it."""


def read(kind: str, config: Facts, tensors: Mapping[str, Tensor], folder: Path) -> Found:
    """The content of a folder, and the tensors left over; keys are without PEFT's prefix.

    Raises:
        AdapterFileError: a part is missing, or of another shape than the others.
    """
    if kind == WORDS:
        left = dict(tensors)
        words = take_words({OPTION: config.get("token_indices")}, left, folder)
        return Content("peft", words=words), left
    if kind == NORMS:
        whole = {key.replace(NORM, "."): tensor for key, tensor in tensors.items() if NORM in key}
        rest = {key: tensor for key, tensor in tensors.items() if NORM not in key}
        return Content("peft", base=whole), rest
    return (_adalora if kind == ADALORA else _vera)(config, tensors, folder)


OPTION = "trainable_token_indices"


def take_words(config: Facts, tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Take the trained rows of tables out of the tensors of a file: by module, which rows and their values.

    Raises:
        AdapterFileError: the config names no rows for them, or another number of rows.
    """
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for key in [key for key in tensors if key.endswith(ROWS)]:
        rows = tensors.pop(key)
        path = key.removeprefix("base_model.model.").removesuffix(ROWS)
        path = ".".join(part for part in path.split(".") if part not in ("token_adapter", "base_layer"))
        named = config.get(OPTION)
        if isinstance(named, dict):
            named = next((own for name, own in named.items() if f".{path}".endswith(f".{name}")), None)
        indices = _indices(named)
        if not indices or rows.dim() != 2 or len(rows) != len(indices):
            raise AdapterFileError(
                f"{folder}: {path} has trained rows {list(rows.shape)}, {OPTION} in its config says {named!r}; the "
                "files belong to different adapters"
            )
        found[path] = indices, rows
    return found


def _indices(named: object) -> tuple[int, ...]:
    """Rows that a config names; none where it is damaged."""
    if not isinstance(named, list) or not all(type(index) is int and index >= 0 for index in named):
        return ()
    return tuple(named)


def _adalora(config: Facts, tensors: Mapping[str, Tensor], folder: Path) -> Found:
    """`ΔW = α / (r₀ + 1e-5) · B diag(E) A`: r₀ is the first rank, whatever is left of it."""
    slots, rest = _slots(tensors, ("lora_A", "lora_B", "lora_E"))
    first, alpha = config.get("init_r"), config.get("lora_alpha")
    if not isinstance(first, int) or not isinstance(alpha, int | float):
        raise AdapterFileError(f"{folder}: no init_r and lora_alpha, so the scale of the update is not known")
    scale = (alpha if alpha > 0 else float(first)) / (first + RANKNUM)
    layers = []
    for path, own in slots.items():
        a, b, e = _complete(own, ("lora_A", "lora_B", "lora_E"), path, folder)
        if b.dim() != 2 or a.dim() != 2 or e.numel() != len(a) or b.shape[1] != len(a):
            raise _misfit(own, path, folder)
        if len(a):  # a layer may have lost all of its rank
            layers.append(Layer(path, a * e.view(-1, 1), b, scale * len(a), factor="AdaLoRA"))
    return Content("peft", layers, dropout=float(config.get("lora_dropout") or 0.0)), rest


def _vera(config: Facts, tensors: Mapping[str, Tensor], folder: Path) -> Found:
    """`ΔW = diag(b) B diag(d) A`, with one random A and B, of which each layer takes as much as it needs."""
    left = dict(tensors)
    shared = {key[-1]: left.pop(key) for key in PROJECTIONS if key in left}
    if set(shared) != {"A", "B"}:
        raise AdapterFileError(
            f"{folder} holds no vera_A and vera_B, which are random and the same for all layers; save it again with "
            "save_projection=True"
        )
    slots, rest = _slots(left, ("vera_lambda_b", "vera_lambda_d"))
    layers = []
    for path, own in slots.items():
        b, d = _complete(own, ("vera_lambda_b", "vera_lambda_d"), path, folder)
        up, down = shared["B"][: len(b)], shared["A"]
        if b.dim() != 1 or len(up) != len(b) or d.shape != (len(down),):
            raise _misfit({**own, "vera_A": shared["A"], "vera_B": shared["B"]}, path, folder)
        layers.append(Layer(path, d[:, None] * down, b[:, None] * up, float(len(d)), factor="VeRA", flat=False))
    return Content("peft", layers, dropout=float(config.get("vera_dropout") or 0.0)), rest


def _slots(
    tensors: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        path, _, name = key.rpartition(".")
        if name in names:
            found.setdefault(path, {})[name] = tensor
        else:
            rest[key] = tensor
    return found, rest


def _complete(own: Mapping[str, Tensor], names: Sequence[str], path: str, folder: Path) -> list[Tensor]:
    missing = [name for name in names if name not in own]
    if missing:
        raise AdapterFileError(f"{folder}: {path} has {' and '.join(sorted(own))} but no {missing[0]}; it is a part")
    return [own[name].float() if own[name].dtype != torch.float32 else own[name] for name in names]


def _misfit(own: Mapping[str, Tensor], path: str, folder: Path) -> AdapterFileError:
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(own.items()))
    return AdapterFileError(f"{folder}: the tensors of {path} do not belong together: {shapes}")
