"""Hugging Face PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`.

Keys are those `PeftModel.save_pretrained` writes: `base_model.model.<path>.lora_A.weight` and the like. Written
folders carry their scale in the tensors (alpha = r), so that a reader that ignores patterns is still right.
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

from mmpeft.errors import AdapterFileError, Refused, nearest
from mmpeft.formats import peft_experts, peft_prompts
from mmpeft.formats.content import PICKLED, Content, Layer, Scaling, assemble, dump_tensors, read_json, read_tensors
from mmpeft.formats.patterns import first_for, matches
from mmpeft.types import Facts, Json, Kwargs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TYPES = ("LORA", "IA3", *peft_prompts.TYPES)
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
    "trainable_token_indices": "trained rows of an embedding",
    "lora_bias": "a bias inside the update",
}
"""Options of a LoRA config that change what its tensors mean, and how."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract from the base: the adapter alone means nothing on the published one."""


def read_folder(folder: Path) -> Content:
    """The adapter in a PEFT folder; layers keep the file's own tensors, alpha is effective (s = alpha / r).

    Raises:
        AdapterFileError: incomplete, pickled, of another type, or with options and keys that mean more than
            low-rank updates, scalings and whole modules.
    """
    config = read_json(folder / CONFIG)
    kind = str(config.get("peft_type", "missing"))
    if kind not in TYPES:
        raise AdapterFileError(
            f"{folder / CONFIG}: peft_type {kind!r} is not read; supported: {', '.join(TYPES)}.{nearest(kind, TYPES)}"
        )
    _check_weights(folder)
    tensors, _ = read_tensors(folder / WEIGHTS)
    if kind in peft_prompts.TYPES:
        learned = peft_prompts.read(config, tensors, folder / WEIGHTS)
        rest = {k.removeprefix(peft_prompts.WRAPPED): t for k, t in tensors.items() if k != peft_prompts.KEY}
        modules = tuple(config.get("modules_to_save") or ())
        whole = _whole(rest, modules, folder / WEIGHTS)
        return Content("peft", learned=learned, whole=whole, modules=modules if whole else ())
    _check_options(config, folder / CONFIG)
    slots, rest = split(tensors, folder / WEIGHTS)
    named = config.get("target_modules") or ()
    stacked = [p for p in slots if peft_experts.is_stack(p, config, named == "all-linear" or targeted(named, p))]
    stacks = peft_experts.taken(slots, stacked, config, folder / WEIGHTS)
    lookups = {key.removeprefix(PREFIX).removesuffix(EMBEDDING) for key in tensors if key.endswith(EMBEDDING)}
    tables = [
        f"{path}.base_layer.weight" for path in lookups if rest.pop(f"{path}.base_layer.weight", None) is not None
    ]
    modules = tuple(config.get("modules_to_save") or ())
    whole = _whole(rest, modules, folder / WEIGHTS)
    notes = tuple(f"holds a copy of the base's table, which is not read: {name}" for name in tables)
    told: Kwargs = {
        "whole": whole,
        "modules": modules,
        "targets": _targets(config),
        "notes": notes,
        "stacks": stacks,
    }
    _check_slots(slots, kind, folder, stacked=stacks is not None)
    if kind == "IA3":
        scalings = [_scaling(path, own["gamma"], config, folder) for path, own in slots.items()]
        return Content("peft", scalings=scalings, **told)
    layers = [scaled(assemble(own, path, folder), config, folder / CONFIG) for path, own in slots.items()]
    layers = [replace(x, lookup=True, transposed=True) if x.path in lookups else x for x in layers]
    _check_dora(layers, config, folder)
    return Content("peft", layers, dropout=float(config.get("lora_dropout") or 0.0), **told)


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
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r: int = config["r"]
    rank = ranks.get(_pattern_key(ranks, layer.path), r)
    if rank != layer.rank:
        raise AdapterFileError(
            f"{where}: rank {rank} for {layer.path}, its tensors have rank {layer.rank}; the files belong to "
            "different adapters"
        )
    own: float = config["lora_alpha"]
    alpha = alphas.get(_pattern_key(alphas, layer.path), own)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return replace(layer, alpha=scale * rank)


def _pattern_key(patterns: Facts, path: str) -> str:
    """PEFT's own rule: the first pattern that matches the path or a suffix of it after a dot."""
    return first_for(patterns, path) or path


def _check_options(config: Facts, where: Path) -> None:
    for name, why in FOREIGN_OPTIONS.items():
        if config.get(name):
            raise AdapterFileError(f"{where}: {name}={config[name]!r} means {why}; it cannot be loaded")
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"{where}: bias={config['bias']!r} trains biases of the base; it cannot be loaded")
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


def _whole(rest: Mapping[str, Tensor], modules: Collection[str], where: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for path, tensor in rest.items():
        parts = path.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        owner = next((o for o in owners if o.endswith(tuple(modules))), "")
        if not owner:
            raise AdapterFileError(
                f"{where}: unknown key {path!r}; it is no part of an update and of no module in modules_to_save "
                f"({sorted(modules) or 'none'})"
            )
        found.setdefault(owner, {})[path.removeprefix(owner + ".")] = tensor
    return found


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


# -- out ----------------------------------------------------------------------------------------------------


def folder_files(content: Content, modules: Collection[str] = (), base_name: str | None = None) -> dict[str, bytes]:
    """Names and bytes of the two files of a PEFT folder.

    `modules` are the module names of the base, where they are known; they decide whether a plain list of targets
    is exact (PEFT takes every module whose path ends with a target).

    Raises:
        Refused: LoRA and DoRA layers; the config has one switch for all.
    """
    if 0 < sum(layer.magnitude is not None for layer in content.layers) < len(content.layers):
        raise Refused("there are both LoRA and DoRA layers; a PEFT folder holds one of them. Use tuning.save()")
    whole, layers = sorted(content.whole), [layer.baked() for layer in content.layers]
    tensors = {f"{PREFIX}{m}.{n}": tensor for m, own in content.whole.items() for n, tensor in own.items()}
    targets = [layer.path for layer in layers] or [scaling.path for scaling in content.scalings]
    config: Json = {
        "fan_in_fan_out": any(x.transposed for x in layers if not x.lookup)
        or any(x.transposed for x in content.scalings),
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": whole or None,
        "target_modules": exact_targets(targets, modules),
        "task_type": None,
    }
    if content.learned is not None:
        tensors = {f"{peft_prompts.WRAPPED}{m}.{n}": t for m, own in content.whole.items() for n, t in own.items()}
        tensors[peft_prompts.KEY] = content.learned.tensor
        for name in ("fan_in_fan_out", "target_modules"):
            del config[name]
        config |= peft_prompts.fields(content.learned)
    elif content.scalings:
        inputs = [scaling.path for scaling in content.scalings if scaling.side == "input"]
        config |= {"peft_type": "IA3", "feedforward_modules": exact_targets(inputs, modules) if inputs else []}
        for scaling in content.scalings:
            tensors[f"{PREFIX}{scaling.path}.ia3_l"] = (
                scaling.gamma[None] if scaling.side == "input" else scaling.gamma[:, None]
            )
    else:
        config |= {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, "use_rslora": False}
        ranks = {layer.path: layer.rank for layer in layers}
        if content.stacks is not None:
            ranks |= content.stacks.config["ranks"]
            config[peft_experts.OPTION] = content.stacks.config[peft_experts.OPTION]
            tensors |= {f"{PREFIX}{name}": tensor for name, tensor in content.stacks.tensors().items()}
        dropout = content.dropout if content.stacks is None else 0.0  # PEFT has none beside updates of parameters
        config |= rank_fields(ranks) | {"lora_dropout": dropout}
        config["use_dora"] = any(layer.magnitude is not None for layer in layers)
        tensors |= lora_tensors(layers, PREFIX)
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


def lora_tensors(layers: Collection[Layer], prefix: str) -> dict[str, Tensor]:
    """Baked layers under PEFT's key names; a convolution's `up` is [o, r, 1, 1], its magnitude [1, o, 1, 1]."""
    tensors = {}
    for layer in layers:
        if layer.lookup:
            tensors[f"{prefix}{layer.path}.lora_embedding_A"] = layer.down
            tensors[f"{prefix}{layer.path}.lora_embedding_B"] = layer.up
            if layer.magnitude is not None:
                tensors[f"{prefix}{layer.path}.lora_magnitude_vector"] = layer.magnitude
            continue
        ones = [1] * (layer.down.dim() - 2)
        tensors[f"{prefix}{layer.path}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{layer.path}.lora_B.weight"] = layer.up.reshape(*layer.up.shape, *ones)
        if layer.magnitude is not None:
            length = layer.magnitude
            tensors[f"{prefix}{layer.path}.lora_magnitude_vector"] = length.view(1, -1, *ones) if ones else length
    return tensors


def exact_targets(paths: list[str], modules: Collection[str]) -> list[str] | str:
    """`target_modules` that match these modules and no other: a list, or a pattern where a list would take more."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) and name not in paths for name in modules):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(paths)
