"""Single LoRA files of the diffusion tools: diffusers' PEFT layout, and kohya's.

diffusers: `unet.<path>.lora_A.weight` (once `.lora.down.weight`), `.lora_B.weight`, `.lora_magnitude_vector`; alpha in
the metadata `lora_adapter_metadata`. kohya: `lora_unet_<path with _>.lora_down.weight`, `.lora_up.weight`,
`.dora_scale`; alpha in a tensor `.alpha` for each layer. LyCORIS: the same names with `.hada_…` and `.lokr_…`.

Written files carry their scale in the tensors (alpha = r, in kohya's style one alpha for all): every tool agrees on
them, whether or not it reads the metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats import lycoris, lycoris_out, original
from mmpeft.formats.content import Content, Layer, assemble, dump_tensors, parse_object, read_tensors
from mmpeft.formats.peft import NOT_YET, PREFIX, exact_targets, lora_fields, lora_tensors, scaled
from mmpeft.hosting.modules import CHILD
from mmpeft.types import Facts, Json

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

Reader = Callable[[Mapping[str, Tensor], str, Path], Layer]

SLOTS = {
    ".lora_A.weight": ("down", "diffusers"),
    ".lora_B.weight": ("up", "diffusers"),
    ".lora_magnitude_vector.weight": ("magnitude", "diffusers"),
    ".lora_magnitude_vector": ("magnitude", "diffusers"),
    ".lora_down.weight": ("down", "kohya"),
    ".lora_up.weight": ("up", "kohya"),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora.up.weight": ("up", "diffusers"),
    ".dora_scale": ("magnitude", ""),
    ".alpha": ("alpha", ""),
}
FACTORS = {
    "diff": "full difference", "diff_b": "full difference", "w_norm": "full difference", "b_norm": "full difference",
    "oft_blocks": "OFT", "oft_diag": "OFT", "boft_blocks": "BOFT", "glora_a1.weight": "GLoRA", "ia3_l": "IA3",
}  # fmt: skip
"""Endings of keys that are recognised and belong to factors without a part here."""

FLAT = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lycoris_": "",
}
DOTTED = {name: name for name in ("unet", "transformer", "text_encoder", "text_encoder_2")} | {"diffusion_model": ""}
FLAT_OUT = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.")
"""How diffusers named the layers of attention before it used PEFT."""
ORIGINAL_NAMES = ("input_blocks_", "middle_block_", "output_blocks_", "double_blocks_", "single_blocks_")


def read_file(path: Path) -> Content:
    """The adapter in a file of either style; layers keep the file's own tensors.

    Raises:
        AdapterFileError: no such file, both styles in one, keys of neither, halves without each other, or alpha
            for some layers only.
    """
    tensors, metadata = read_tensors(path)
    keys = _sorted_keys(tensors, path)
    layers = [_layer(name, own, path) for name, own in keys.slots.items() if name not in keys.factored]
    layers, notes = _with_alpha(layers, _configs(metadata, path), path)
    factored = sorted(keys.factored & set(keys.slots))
    layers += [_layer(name, keys.slots[name], path, lycoris.layer_of) for name in factored]
    style = keys.style or ("lycoris" if keys.others or keys.factored else "diffusers")
    if style == "diffusers" and all(name.startswith(original.PREFIX) for name in keys.slots):
        style = "comfy"
    others = {_place(name)[1]: kind for name, kind in keys.others.items()}
    return Content(style, layers, notes=notes, others=others)


class _Keys(NamedTuple):
    """A file's tensors by layer and slot; layers whose factors are LyCORIS's, and others' that are not read."""

    slots: dict[str, dict[str, Tensor]]
    factored: set[str]
    others: dict[str, str]
    style: str


def _sorted_keys(tensors: Mapping[str, Tensor], path: Path) -> _Keys:
    """What each key of a file is; raises where one is unknown, or of another style than the rest."""
    slots: dict[str, dict[str, Tensor]] = {}
    factored: set[str] = set()
    others: dict[str, str] = {}
    styles: dict[str, str] = {}
    for key, tensor in sorted(tensors.items()):
        why = next((why for suffix, why in NOT_YET.items() if key.endswith(suffix)), "")
        if why:
            raise AdapterFileError(f"{path}: {key} is {why}; it cannot be loaded")
        key = PROCESSOR.sub(lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.{m[2]}.", key)
        found = next((s for s in SLOTS if key.endswith(s)), "")
        factor = next((f for f in FACTORS if key.endswith(f".{f}")), "")
        part = next((f for f in lycoris.KINDS if key.endswith(f".{f}")), "")
        if part:
            factored.add(name := key.removesuffix(f".{part}"))
            slots.setdefault(name, {})[part] = tensor
        elif found:
            slot, style = SLOTS[found]
            _check_lengths(key, found, tensor, path)
            slots.setdefault(key.removesuffix(found), {})[slot] = tensor
            styles.setdefault(style, key)
        elif factor:
            others[key.removesuffix(f".{factor}")] = FACTORS[factor]
        else:
            raise AdapterFileError(
                f"{path}: unknown key {key!r}; expected low-rank layers such as unet.<path>.lora_A.weight or "
                "lora_unet_<path>.lora_down.weight"
            )
    slots = {name: own for name, own in slots.items() if name not in others}
    styles.pop("", None)
    if len(styles) > 1:
        raise AdapterFileError(f"{path} mixes two formats: {' and '.join(styles.values())}; split it")
    if any(name.startswith(PREFIX) for name in slots):
        raise AdapterFileError(
            f"{path} holds the tensors of a PEFT folder; their alpha is in adapter_config.json, which is not beside it"
        )
    return _Keys(slots, factored, others, next(iter(styles), ""))


def _check_lengths(key: str, slot: str, tensor: Tensor, path: Path) -> None:
    if slot == ".dora_scale" and len(tensor) == 1 < tensor.numel():
        raise AdapterFileError(
            f"{path}: {key} has shape {tuple(tensor.shape)}, the lengths of input columns, which are another "
            "method than DoRA; expected one length for each output row"
        )


def _with_alpha(layers: list[Layer], configs: Mapping[str, Facts], path: Path) -> tuple[list[Layer], tuple[str, ...]]:
    """Layers with the alpha that the file's configuration says where they carry none, and what is to be noted."""
    with_alpha = [layer for layer in layers if layer.alpha is not None]
    if configs and not with_alpha:
        return [_configured(layer, configs, path) for layer in layers], ()
    if with_alpha and len(with_alpha) < len(layers):
        bare = next(layer for layer in layers if layer.alpha is None)
        raise AdapterFileError(
            f"{path}: {len(with_alpha)} of {len(layers)} layers have an alpha, {bare.path} has none; its scale is not "
            "known"
        )
    if layers and not with_alpha:
        return layers, ("the file carries no alpha: scale 1, as every reader takes it",)
    return layers, ()


def _place(name: str) -> tuple[str, str, bool]:
    """(component, path, flat) of the name before a key's slot."""
    for prefix, component in FLAT.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix), True
    first, _, rest = name.partition(".")
    return (DOTTED[first], rest, False) if first in DOTTED and rest else ("", name, False)


def _layer(name: str, own: Mapping[str, Tensor], where: Path, read: Reader = assemble) -> Layer:
    component, path, flat = _place(name)
    layer = read(own, path, where)
    kernel = bool(layer.factor) and layer.down.dim() == 2  # perhaps a convolution's, flattened
    return replace(layer, component=component, flat=(flat and "_" in path) or kernel)


def _configs(metadata: Mapping[str, str], where: Path) -> dict[str, Json]:
    """LoRA configs by component, from `lora_adapter_metadata`."""
    if METADATA not in metadata:
        return {}
    try:
        packed = parse_object(metadata[METADATA])
    except ValueError as error:
        raise AdapterFileError(f"{where}: its metadata {METADATA} is no JSON object: {error}") from error
    configs: dict[str, Json] = {}
    for key, value in packed.items():
        component, _, name = key.partition(".")
        if component in DOTTED and name:
            configs.setdefault(component, {})[name] = value
        else:
            configs.setdefault("", {})[key] = value
    return configs


def _configured(layer: Layer, configs: Mapping[str, Facts], where: Path) -> Layer:
    return scaled(layer, configs[layer.component], where) if layer.component in configs else layer


# -- names of modules ---------------------------------------------------------------------------------------


def resolve(layers: Sequence[Layer], model: nn.Module | None, where: object) -> list[Layer]:
    """Layers by the model's own module paths; those that match none keep their name.

    Raises:
        AdapterFileError: underscores and no model to read them by, or two modules of the same flat name.
    """
    if model is None:
        flat = next((layer for layer in layers if layer.flat), None)
        if flat is not None:
            raise AdapterFileError(
                f"{where}: the name {flat.path!r} does not say which underscores are dots, or a flat kernel how it was "
                "folded; give the model whose modules it names"
            )
        return list(layers)
    layers = original.split(layers, model, where)
    flats: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if CHILD not in name.split("."):
            flats.setdefault(name.replace(".", "_"), []).append(name)
    return [lycoris.shaped(_resolved(layer, flats, where), model) for layer in layers]


def _resolved(layer: Layer, flats: Mapping[str, list[str]], where: object) -> Layer:
    found = flats.get(layer.path.replace(".", "_"), [])
    bare = layer.path.replace(".", "_").removeprefix("text_model_")
    if not found and bare in flats:  # CLIP's text models have lost their inner `text_model`, files keep it
        return replace(layer, path=flats[bare][0], flat=False)
    if layer.flat:
        if len(found) > 1:
            raise AdapterFileError(f"{where}: {layer.path!r} names {len(found)} modules: {' and '.join(found)}")
        if layer.path.startswith(ORIGINAL_NAMES) and not found:
            raise AdapterFileError(
                f"{where}: {layer.path!r} is a name of the original code base, not of diffusers; convert the file "
                "with the tool that wrote it"
            )
        return replace(layer, path=found[0], flat=False) if found else layer
    inner = f"{layer.component}.{layer.path}"  # a model whose own first module is called `transformer`
    if layer.path not in found and inner in flats.get(inner.replace(".", "_"), []):
        return replace(layer, path=inner, component="")
    return layer


def component_for(model: nn.Module) -> str:
    """What a pipeline calls a model of this class: `unet`, `transformer` or `text_encoder`."""
    name = type(model).__name__.removeprefix("Tuned")
    if "UNet" in name:
        return "unet"
    return "text_encoder" if "Text" in name else "transformer"


# -- out ----------------------------------------------------------------------------------------------------


def in_files(layers: Collection[Layer], component: str) -> list[Layer]:
    """Layers of one model of a pipeline by the paths that files have: those of CLIP's text models with `text_model`."""
    prefix = "text_model." if component.startswith("text_encoder") and component != "text_encoder_3" else ""
    return [
        replace(x, component=component, path=x.path if x.path.startswith(prefix) else prefix + x.path) for x in layers
    ]


def diffusers_bytes(layers: Collection[Layer], component: str, modules: Collection[str] = ()) -> bytes:
    """A `pytorch_lora_weights.safetensors` with the least metadata that every diffusers accepts."""
    baked = {c: [x.baked() for x in layers if (x.component or component) == c] for c in _components(layers, component)}
    tensors: dict[str, Tensor] = {}
    packed: Json = {}
    for name, own in baked.items():
        tensors |= lora_tensors(own, f"{name}.")
        bare = [replace(layer, path=layer.path.removeprefix("text_model.")) for layer in own]  # names that end both
        fields = lora_fields(bare) | {"target_modules": exact_targets([layer.path for layer in bare], modules)}
        if bare[0].path != own[0].path:
            for key in ("rank_pattern", "alpha_pattern"):
                fields[key] = {path.removeprefix("^"): value for path, value in fields[key].items()}
        packed |= {f"{name}.{key}": value for key, value in fields.items()}
    return dump_tensors(tensors, {"format": "pt", METADATA: json.dumps(packed, sort_keys=True)})


def kohya_bytes(layers: Collection[Layer], component: str) -> bytes:
    """A file as kohya's scripts write it; two layers of the same flat name are refused.

    All layers have the same alpha, the largest rank: diffusers reads only the most common one for attention.
    """
    tensors: dict[str, Tensor] = {}
    alpha = float(max(layer.rank for layer in layers))
    for layer in layers:
        own = layer.baked(alpha)
        name = FLAT_OUT[layer.component or component] + own.path.replace(".", "_")
        if f"{name}.alpha" in tensors:
            raise Refused(f"{own.path} and another module are both {name} in a kohya file; write the diffusers format")
        if own.tensors:
            tensors |= lycoris_out.named(own, name)
            continue
        ones = [1] * (own.down.dim() - 2)
        tensors[f"{name}.lora_down.weight"] = own.down
        tensors[f"{name}.lora_up.weight"] = own.up.reshape(*own.up.shape, *ones)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        if own.magnitude is not None:
            tensors[f"{name}.dora_scale"] = own.magnitude.view(-1, 1, *ones)
    ranks = {layer.rank for layer in layers}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    module = "lycoris.kohya" if any(layer.tensors for layer in layers) else "networks.lora"
    header = {"ss_network_module": module, "ss_network_dim": dim, "ss_network_alpha": str(alpha)}
    return dump_tensors(tensors, header)


def _components(layers: Collection[Layer], component: str) -> list[str]:
    return sorted({layer.component or component for layer in layers})
