"""What the keys of a single adapter file are: slots of low-rank layers, LyCORIS's factors, differences, the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from mmpeft.errors import AdapterFileError
from mmpeft.formats import lycoris
from mmpeft.formats.peft import NOT_YET, PREFIX

SLOTS = {
    ".lora_A.weight": ("down", "diffusers"),
    ".lora_B.weight": ("up", "diffusers"),
    ".lora_B.bias": ("up_bias", "diffusers"),
    ".lora_magnitude_vector.weight": ("magnitude", "diffusers"),
    ".lora_magnitude_vector": ("magnitude", "diffusers"),
    ".lora_A": ("down", "diffusers"),
    ".lora_B": ("up", "diffusers"),
    ".lora_down.weight": ("down", "kohya"),
    ".lora_up.weight": ("up", "kohya"),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora.up.weight": ("up", "diffusers"),
    ".dora_scale": ("magnitude", ""),
    ".alpha": ("alpha", ""),
}
"""Endings of keys → the slot of a low-rank layer, and whose style it is; the first that fits counts."""
DIFFERENCES: dict[str, Literal["weight", "bias"]] = {
    "diff": "weight",
    "diff_b": "bias",
    "w_norm": "weight",
    "b_norm": "bias",
}
"""Endings of keys that hold a full difference → the tensor that it is of."""
BASED = {
    "oft_blocks": "OFT",
    "rescale": "OFT",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "set_weight": "weight",
}
"""Endings of keys of factors whose ΔW depends on the base's weight."""
FACTORS = {"oft_diag": "OFT of old", "boft_blocks": "BOFT", "bm.weight": "GLoRA with a core", "on_input": "IA3"}
"""Endings of keys that are recognised and belong to factors without a part here."""
PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.")
"""How diffusers named the layers of attention before it used PEFT."""
TEXT_PROCESSOR = re.compile(r"\.self_attn\.to_(q|k|v|out)_lora\.(down|up)\.")
"""The same in text encoders, whose modules have other names."""


@dataclass
class Keys:
    """A file's tensors by layer and what they are."""

    slots: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Layer → its tensors by slot."""
    factored: set[str] = field(default_factory=set)
    """Layers whose factors are LyCORIS's."""
    shifts: dict[str, dict[Literal["weight", "bias"], Tensor]] = field(default_factory=dict)
    """Module → its full differences, of `weight` and `bias`."""
    based: dict[str, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)
    """Module → a factor that needs the base, and its tensors."""
    others: dict[str, str] = field(default_factory=dict)
    """Module → a factor that is not read."""
    unread: list[str] = field(default_factory=list)
    """Keys that mean nothing here."""
    style: str = ""


def sorted_keys(tensors: Mapping[str, Tensor], path: Path) -> Keys:
    """What each key of a file is.

    Raises:
        AdapterFileError: no key is known, two styles are mixed, or a known one cannot be loaded.
    """
    keys = Keys()
    styles: dict[str, str] = {}
    for original, tensor in sorted(tensors.items()):
        key = _spelled(original)
        why = next((why for suffix, why in NOT_YET.items() if key.endswith(suffix) and suffix != ".lora_B.bias"), "")
        if why:
            raise AdapterFileError(f"{path}: {original} is {why}; it cannot be loaded")
        head, _, last = key.rpartition(".")
        name, ending = (
            (head, last) if last != "weight" else (head.rpartition(".")[0], f"{head.rpartition('.')[2]}.{last}")
        )
        found = next((s for s in SLOTS if key.endswith(s)), "")
        if ending in lycoris.KINDS:
            keys.factored.add(name)
            keys.slots.setdefault(name, {})[ending] = tensor
        elif found:
            slot, style = SLOTS[found]
            if found == ".dora_scale" and len(tensor) == 1 < tensor.numel():
                slot = "columns"
            keys.slots.setdefault(key.removesuffix(found), {})[slot] = tensor
            styles.setdefault(style, original)
        elif ending in DIFFERENCES:
            keys.shifts.setdefault(name, {})[DIFFERENCES[ending]] = tensor
        elif ending in BASED:
            keys.based.setdefault(name, (BASED[ending], {}))[1][ending] = tensor
        elif ending in FACTORS:
            keys.others[name] = FACTORS[ending]
        else:
            keys.unread.append(original)
    _take_alpha(keys)
    if not (keys.slots or keys.shifts or keys.based or keys.others):
        raise AdapterFileError(
            f"{path}: unknown key {min(keys.unread)!r}; expected low-rank layers such as unet.<path>.lora_A.weight or "
            "lora_unet_<path>.lora_down.weight"
        )
    styles.pop("", None)
    if len(styles) > 1:
        raise AdapterFileError(f"{path} mixes two formats: {' and '.join(styles.values())}; split it")
    if any(name.startswith(PREFIX) for name in keys.slots):
        raise AdapterFileError(
            f"{path} holds the tensors of a PEFT folder; their alpha is in adapter_config.json, which is not beside it"
        )
    keys.style = next(iter(styles), "")
    return keys


def _spelled(key: str) -> str:
    """A key as today's tools write it, where older ones wrote it otherwise."""
    key = PROCESSOR.sub(lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.{m[2]}.", key)
    key = TEXT_PROCESSOR.sub(lambda m: f".self_attn.{m[1]}_proj.lora.{m[2]}.", key)
    key = key.replace(".lora_linear_layer.", ".lora.").replace(".default.weight", ".weight")
    first, _, rest = key.partition(".")
    return f"{first}.{rest.removeprefix(PREFIX)}" if rest.startswith(PREFIX) else key


def _take_alpha(keys: Keys) -> None:
    """Give factors that need the base what slots they share with low-rank layers, and drop what belongs to others."""
    for name, own in list(keys.slots.items()):
        if name in keys.others:
            del keys.slots[name]
        elif name in keys.based:
            keys.based[name][1].update(keys.slots.pop(name))
        elif set(own) <= {"alpha"} and name in keys.shifts:
            del keys.slots[name]
