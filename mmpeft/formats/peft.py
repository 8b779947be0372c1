"""Hugging Face PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`.

Keys are those `PeftModel.save_pretrained` writes: `base_model.model.<path>.lora_A.weight` and the like. Every other
key is a name in the tuned model: PEFT puts its tensor there, whatever the config says, or drops it without a word.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mmpeft.errors import AdapterFileError, nearest
from mmpeft.formats import peft_experts, peft_others, peft_prompts
from mmpeft.formats.content import (
    PICKLED,
    Content,
    Layer,
    Scaling,
    Shift,
    assemble,
    dump_tensors,
    read_json,
    read_tensors,
)
from mmpeft.formats.patterns import matches, value_for
from mmpeft.types import Facts, Json, Kwargs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TYPES = ("LORA", "IA3", *peft_others.TYPES, *peft_prompts.TYPES)
EMBEDDING = ".lora_embedding_A"

SLOTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".ia3_l": "gamma",
}
SHIFT = ".lora_B.bias"
LENGTHS = ".lora_magnitude_vector"
LENGTHS_FOR_ALL = f"{LENGTHS}.weight"
"""PEFT writes the first and reads both; transformers' own loader finds the second alone."""
NOT_YET = {
    ".base_layer.out_proj.lora_A.weight": "an update of nn.MultiheadAttention, of whose out_proj PEFT adds ΔW twice",
    ".lora_A.bias": "a bias inside the update (lora_bias=True)",
    ".lora_B.bias": "a bias inside the update (lora_bias=True)",
    ".trainable_tokens_delta": "trained rows of an embedding (trainable_token_indices)",
}
FOREIGN_OPTIONS = {
    "alora_invocation_tokens": "an update that acts after an invocation only (aLoRA)",
    "arrow_config": "routing among adapters (Arrow)",
    "kasa_config": "another factor (KaSA)",
    "velora_config": "another factor (VeLoRA)",
    "monteclora_config": "another factor (MonteCLoRA)",
    "use_bdlora": "another factor (BD-LoRA)",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "layer_replication": "a base with repeated layers",
}
"""Options of a LoRA config that change what its tensors mean, and how."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract from the base: the adapter alone means nothing on the published one."""
NAMED = re.compile(r"(\.(?:lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l))\.default(\.weight|\.bias)?$")
"""Keys of a model's state dict, in which an adapter has a name; PEFT reads those of its usual one, too."""
FOREIGN_KEY = re.compile(r"(^|[._])(lora|loha|hada|lokr|oft|boft|vera|ia3|hra|miss|road|shira|randlora|c3a|glora)_")
"""Keys of an adapter: what has one and is not read is a layer that would be lost, and no stranger beside the layers."""


def read_folder(folder: Path) -> Content:
    """The adapter in a PEFT folder; layers keep the file's own tensors, alpha is effective (s = alpha / r).

    Raises:
        AdapterFileError: incomplete, pickled, of another type, or with options and keys that mean more than
            low-rank updates, scalings, rows of tables and tensors of the base.
    """
    config = read_json(folder / CONFIG)
    kind = str(config.get("peft_type", "missing"))
    if kind not in TYPES:
        raise AdapterFileError(
            f"{folder / CONFIG}: peft_type {kind!r} is not read; supported: {', '.join(TYPES)}.{nearest(kind, TYPES)} "
            "Merged with PEFT (merge_and_unload), the model itself can be loaded"
        )
    _check_weights(folder)
    tensors, _ = read_tensors(folder / WEIGHTS)
    tensors = {NAMED.sub(r"\1\2", key): tensor for key, tensor in tensors.items()}
    if kind in peft_prompts.TYPES:
        learned = peft_prompts.read(config, tensors, folder / WEIGHTS)
        rest = {k.removeprefix(peft_prompts.WRAPPED): t for k, t in tensors.items() if k != peft_prompts.KEY}
        whole, others = _whole(rest, config)
        return Content("peft", learned=learned, whole=whole, modules=_modules(config) if whole else (), base=others)
    _check_options(config, folder / CONFIG)
    if kind in peft_others.TYPES:
        return with_rest(peft_others.read(kind, config, _short(tensors), folder), config, folder)
    words = peft_others.take_words(config, tensors, folder)
    shifts = {key.removesuffix(SHIFT): tensors.pop(key) for key in list(tensors) if key.endswith(SHIFT)}
    slots, rest = split(tensors, folder / WEIGHTS)
    named = config.get("target_modules") or ()
    stacked = [p for p in slots if peft_experts.is_stack(p, config, named == "all-linear" or targeted(named, p))]
    stacks = peft_experts.taken(slots, stacked, config, folder / WEIGHTS)
    lookups = {key.removeprefix(PREFIX).removesuffix(EMBEDDING) for key in tensors if key.endswith(EMBEDDING)}
    told: Kwargs = {"targets": _targets(config), "stacks": stacks, "words": words}
    _check_slots(slots, kind, folder, stacked=stacks is not None)
    if kind == "IA3":
        scalings = [_scaling(path, own["gamma"], config, folder) for path, own in slots.items()]
        return with_rest((Content("peft", scalings=scalings, **told), rest), config, folder)
    layers = [scaled(assemble(own, path, folder), config, folder / CONFIG) for path, own in slots.items()]
    layers = [replace(x, lookup=True, transposed=True) if x.path in lookups else x for x in layers]
    _check_dora(layers, config, folder)
    scales = {PREFIX + layer.path: layer.scale for layer in layers}
    told["shifts"] = [
        Shift(path.removeprefix(PREFIX), "bias", bias.float() * scales.get(path, 1)) for path, bias in shifts.items()
    ]
    layers = [layer.trimmed() for layer in layers]
    return with_rest(
        (Content("peft", layers, dropout=float(config.get("lora_dropout") or 0.0), **told), rest), config, folder
    )


def _short(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def with_rest(found: tuple[Content, Mapping[str, Tensor]], config: Facts, folder: Path) -> Content:
    """Content with what is no part of an update: modules saved whole, and tensors of the base.

    Raises:
        AdapterFileError: a tensor of an adapter is left over.
    """
    content, rest = found
    whole, base = _whole(rest, config)
    stray = next((name for name in base if FOREIGN_KEY.search(name)), "")
    if stray:
        raise AdapterFileError(
            f"{folder / WEIGHTS}: unknown key {stray!r} of an update; {CONFIG} says {config.get('peft_type')}, and the "
            "update would be lost"
        )
    return replace(content, whole=whole, modules=_modules(config), base={**content.base, **base})


def _modules(config: Facts) -> tuple[str, ...]:
    return tuple(config.get("modules_to_save") or ())


def _check_weights(folder: Path) -> None:
    if not (folder / WEIGHTS).exists():
        found = sorted(p.name for p in folder.iterdir() if p.name != CONFIG)
        pickled = [name for name in found if name.endswith(PICKLED)]
        why = (
            f"{pickled[0]} is pickled, and reading it would run code it holds; save it again with "
            "safe_serialization=True"
            if pickled
            else f"the folder holds {found or 'nothing else'}; it was copied in part"
        )
        raise AdapterFileError(f"no {WEIGHTS} in {folder}: {why}")


def _check_slots(slots: Mapping[str, Mapping[str, Tensor]], kind: str, folder: Path, *, stacked: bool) -> None:
    """Raise where a layer has tensors of another kind of adapter, or there is no layer at all."""
    expected = {"gamma"} if kind == "IA3" else {"down", "up", "magnitude"}
    for path, own in slots.items():
        if not set(own) <= expected:
            raise AdapterFileError(
                f"{folder}: {CONFIG} says {kind}, {path} has {sorted(set(own) - expected)}; the files belong to "
                "different adapters"
            )
    if not slots and not stacked:
        raise AdapterFileError(f"{folder / WEIGHTS} holds no layer of a {kind} adapter")


def split(tensors: Mapping[str, Tensor], where: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module and slot, and those that are no slot of an update."""
    slots: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        for suffix, why in NOT_YET.items():
            if key.endswith(suffix):
                raise AdapterFileError(f"{where}: {key} is {why}; it cannot be loaded")
        path = key.removeprefix(PREFIX)
        suffix = next((s for s in SLOTS if path.endswith(s)), "")
        if suffix:
            slots.setdefault(path.removesuffix(suffix), {})[SLOTS[suffix]] = tensor
        else:
            rest[path] = tensor
    return slots, rest


def scaled(layer: Layer, config: Facts, where: Path) -> Layer:
    """A layer with the effective alpha that a LoRA config gives it: s = alpha / r, or alpha / √r for rsLoRA.

    Raises:
        AdapterFileError: no alpha, or a rank other than the tensors'.
    """
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise AdapterFileError(f"{where}: no {name}, so the scale of the update is not known; restore the config")
    rank: int = value_for(config.get("rank_pattern"), layer.path, config["r"])
    if rank != layer.rank:
        raise AdapterFileError(
            f"{where}: rank {rank} for {layer.path}, its tensors have rank {layer.rank}; the files belong to "
            "different adapters"
        )
    alpha: float = value_for(config.get("alpha_pattern"), layer.path, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return replace(layer, alpha=scale * rank)


def _check_options(config: Facts, where: Path) -> None:
    for name, why in FOREIGN_OPTIONS.items():
        if config.get(name):
            raise AdapterFileError(f"{where}: {name}={config[name]!r} means {why}; it cannot be loaded")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise AdapterFileError(
            f"{where}: init_lora_weights={start!r} subtracts the initial update from the base weights, which this "
            "folder does not hold; save it with path_initial_model_for_weight_conversion, which writes an ordinary LoRA"
        )


def _check_dora(layers: Collection[Layer], config: Facts, where: Path) -> None:
    have = sum(layer.magnitude is not None for layer in layers)
    if have != (len(layers) if config.get("use_dora") else 0):
        raise AdapterFileError(
            f"{where}: use_dora={bool(config.get('use_dora'))}, but {have} of {len(layers)} layers have a magnitude; "
            "the files belong to different adapters"
        )


def _whole(rest: Mapping[str, Tensor], config: Facts) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of the modules saved whole, by module, and those that are none of them, by their names in the base."""
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    modules = _modules(config)
    for path, tensor in rest.items():
        parts = path.split(".")
        if {"modules_to_save", "original_module"} & set(parts):
            continue  # bias="all" saves those of both copies besides, and PEFT reads neither
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        owner = next((o for o in owners if o.endswith(modules)), "")  # PEFT's own rule, without a dot
        if owner:
            found.setdefault(owner, {})[path.removeprefix(owner + ".")] = tensor
        else:
            others[".".join(part for part in parts if part != "base_layer")] = tensor
    return found, others


def targeted(targets: str | Collection[str], path: str) -> bool:
    """PEFT's own rule: a pattern for the whole path, or names that the path is or ends with."""
    if isinstance(targets, str):
        return matches(targets, path)
    return any(path == name or path.endswith(f".{name}") for name in targets)


def _targets(config: Facts) -> str | tuple[str, ...]:
    """`target_modules` where they alone say which modules have a layer."""
    chosen = config.get("target_modules") or ()
    others = ("layers_to_transform", "exclude_modules")
    if chosen == "all-linear" or any(config.get(name) not in (None, []) for name in others):
        return ()
    return chosen if isinstance(chosen, str) else tuple(chosen)


def _scaling(path: str, gamma: Tensor, config: Facts, folder: Path) -> Scaling:
    inside = targeted(config.get("feedforward_modules") or (), path)
    if gamma.dim() > 1 and gamma.shape[1 if not inside else 0] != 1:
        raise AdapterFileError(
            f"{folder}: {path} has a vector of shape {tuple(gamma.shape)}, expected "
            f"{'[1, i], on the input' if inside else '[o, 1], on the output'}, by feedforward_modules in {CONFIG}"
        )
    return Scaling(path, gamma.flatten(), "input" if inside else "output")


# -- shared with what writes --------------------------------------------------------------------------------


def folder_of(tensors: Mapping[str, Tensor], fields: Facts, base: Facts | None) -> dict[str, bytes]:
    """Names and bytes of a folder's two files; a config has `fields`, what is said of its base, and what all have."""
    config: Json = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
        **(base or {}),
        **fields,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {WEIGHTS: dump_tensors(tensors, {"format": "pt"}), CONFIG: text.encode()}


def lora_fields(layers: Collection[Layer]) -> Json:
    """Rank, alpha, their patterns and `use_dora` of baked layers, as a LoraConfig has them."""
    dora = any(layer.magnitude is not None for layer in layers)
    return rank_fields({layer.path: layer.rank for layer in layers}) | {"use_dora": dora}


def rank_fields(ranks: Mapping[str, int]) -> Json:
    """Rank, alpha and their patterns for what has these ranks and its scale in the tensors."""
    rank, _ = Counter(ranks.values()).most_common(1)[0]
    others = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    return {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}


def lora_tensors(layers: Collection[Layer], prefix: str, lengths: str = LENGTHS) -> dict[str, Tensor]:
    """Baked layers under PEFT's key names; a convolution's `up` is [o, r, 1, 1], its magnitude [1, o, 1, 1].

    `lengths` ends the magnitudes' names.
    """
    tensors = {}
    for layer in layers:
        if layer.lookup:
            tensors[f"{prefix}{layer.path}.lora_embedding_A"] = layer.down
            tensors[f"{prefix}{layer.path}.lora_embedding_B"] = layer.up
            if layer.magnitude is not None:
                tensors[f"{prefix}{layer.path}{lengths}"] = layer.magnitude
            continue
        ones = [1] * (layer.down.dim() - 2)
        tensors[f"{prefix}{layer.path}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{layer.path}.lora_B.weight"] = layer.up.reshape(*layer.up.shape, *ones)
        if layer.magnitude is not None:
            length = layer.magnitude
            tensors[f"{prefix}{layer.path}{lengths}"] = length.view(1, -1, *ones) if ones else length
    return tensors


def exact_targets(paths: list[str], modules: Collection[str]) -> list[str] | str:
    """`target_modules` that match these modules and no other: a list, or a pattern where a list would take more."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) and name not in paths for name in modules):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(paths)
