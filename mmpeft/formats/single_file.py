"""A single adapter file, of diffusers' style or kohya's, as neutral content.

diffusers: `unet.<path>.lora_A.weight` (once `.lora.down.weight`), `.lora_B.weight`, `.lora_magnitude_vector`; alpha in
the metadata `lora_adapter_metadata`. kohya: `lora_unet_<path with _>.lora_down.weight`, `.lora_up.weight`,
`.dora_scale`; alpha in a tensor `.alpha` for each layer. LyCORIS: the same names with `.hada_…` and `.lokr_…`. Also
read are full differences of weights, biases and norms, and what depends on the base's weight (OFT, GLoRA, DoRA by
input column).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from mmpeft.errors import AdapterFileError
from mmpeft.formats import lycoris, original
from mmpeft.formats.based import COLUMNS, COMFY, FOR_COMFY
from mmpeft.formats.content import Based, Content, Layer, Shift, assemble, parse_object, read_tensors
from mmpeft.formats.names import DOTTED, placed
from mmpeft.formats.peft import scaled
from mmpeft.formats.single_keys import Keys, sorted_keys
from mmpeft.types import Facts, Json, Kwargs

METADATA = "lora_adapter_metadata"
SCALE = "scale 1, as every reader takes it"
MIXED = "scale 1, as ComfyUI and sd-scripts take it; diffusers gives them the alpha of the others"

Reader = Callable[[Mapping[str, Tensor], str, Path], Layer]


def read_file(path: Path) -> Content:
    """The adapter in a file of either style; layers keep the file's own tensors.

    Raises:
        AdapterFileError: no such file, both styles in one, no known key, or halves without each other.
    """
    tensors, metadata = read_tensors(path)
    keys = sorted_keys(tensors, path)
    layers, shifts, based, notes = _updates(keys, _configs(metadata, path), path)
    if FOR_COMFY in metadata:
        based += [_for_comfy(layer) for layer in layers if layer.magnitude is not None]
        layers = [layer for layer in layers if layer.magnitude is None]
    for name, own in keys.shifts.items():
        for tensor, value in own.items():
            if value.dim() > 1:
                layers.append(_difference(name, value))
            else:
                shifts.append(_shift(name, tensor, value))
    based += [_named(Based("", kind, own), name) for name, (kind, own) in keys.based.items()]
    style = keys.style or ("lycoris" if keys.others or keys.factored or keys.shifts or based else "diffusers")
    if style == "diffusers" and all(name.startswith(original.PREFIX) for name in keys.slots):
        style = "comfy"
    doubts = tuple(note for note in notes if note.endswith(MIXED))
    if keys.unread:
        notes += (f"{len(keys.unread)} keys are of no known kind and are left out, first {keys.unread[0]!r}",)
    others = {placed(name)[1]: kind for name, kind in keys.others.items()}
    unread = tuple(keys.unread)
    told: Kwargs = {"notes": notes, "doubts": doubts, "unread": unread}
    return Content(style, layers, others=others, shifts=shifts, based=based, **told)


def _updates(
    keys: Keys, configs: Mapping[str, Facts], path: Path
) -> tuple[list[Layer], list[Shift], list[Based], tuple[str, ...]]:
    """Low-rank layers, the biases inside them, those whose lengths are of input columns, and what is to be noted."""
    biases = {name: own.pop("up_bias") for name, own in keys.slots.items() if "up_bias" in own}
    columns = {name: own.pop("columns") for name, own in keys.slots.items() if "columns" in own}
    names = [name for name in keys.slots if name not in keys.factored]
    plain, notes = _with_alpha([_layer(name, keys.slots[name], path) for name in names], configs, path)
    read = dict(zip(names, plain))
    read |= {name: _layer(name, keys.slots[name], path, lycoris.layer_of) for name in sorted(keys.factored)}
    layers = [layer for name, layer in read.items() if name not in columns]
    based = []
    for name, lengths in columns.items():
        layer = read[name]
        own = {"up": layer.up * layer.scale, "down": layer.down, "columns": lengths}
        based.append(Based(layer.path, COLUMNS, own, layer.component, layer.flat))
    shifts = [_shift(name, "bias", value * read[name].scale) for name, value in biases.items()]
    return layers, shifts, based, notes


def _with_alpha(layers: list[Layer], configs: Mapping[str, Facts], path: Path) -> tuple[list[Layer], tuple[str, ...]]:
    """Layers with the alpha that the file's configuration says where they carry none, and what is to be noted."""
    with_alpha = [layer for layer in layers if layer.alpha is not None]
    if configs and not with_alpha:
        return [_configured(layer, configs, path) for layer in layers], ()
    if len(with_alpha) == len(layers):
        return layers, ()
    some = f"{len(layers) - len(with_alpha)} of {len(layers)} layers carry no alpha: {MIXED}"
    return layers, (some if with_alpha else f"the file carries no alpha: {SCALE}",)


def _layer(name: str, own: Mapping[str, Tensor], where: Path, read: Reader = assemble) -> Layer:
    component, path, flat = placed(name)
    layer = read(own, path, where)
    kernel = bool(layer.factor) and layer.down.dim() == 2  # perhaps a convolution's, flattened
    return replace(layer, component=component, flat=flat or kernel)


def _for_comfy(layer: Layer) -> Based:
    assert layer.magnitude is not None
    own = {"up": layer.up * layer.scale, "down": layer.down, "magnitude": layer.magnitude}
    return Based(layer.path, COMFY, own, layer.component, layer.flat)


def _named(item: Based, name: str) -> Based:
    component, path, flat = placed(name)
    return replace(item, path=path, component=component, flat=flat)


def _shift(name: str, tensor: Literal["weight", "bias"], value: Tensor) -> Shift:
    component, path, flat = placed(name)
    return Shift(path, tensor, value, component, flat)


def _difference(name: str, value: Tensor) -> Layer:
    component, path, flat = placed(name)
    down, up = lycoris.multiplied(value)
    return Layer(path, down, up, float(len(down)), None, component, flat, factor="full difference")


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
