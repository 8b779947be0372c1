"""Files as kohya's scripts write them: flat names of the code base that they train, one alpha for all layers.

    lora_unet_down_blocks_0_attentions_0_…         UNets, by diffusers' names
    lora_unet_input_blocks_4_1_…                   SDXL's, by the names of its own repository
    lora_unet_double_blocks_0_img_attn_qkv         Flux and SD3, by those of their own repositories, in one where fused
    lora_te_…                                      the one text encoder of a pipeline; lora_te1_, lora_te2_ where it has
                                                   several, lora_te3_ for T5
    lycoris_blocks_0_attn_…                        any other model's, by its own names, as LyCORIS wraps modules

Beside low-rank layers: LyCORIS's factors, and full differences of weights (`diff`), biases (`diff_b`) and norms
(`w_norm`, `b_norm`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.formats import lycoris_out, original
from mmpeft.formats.content import Layer, Shift, dump_tensors
from mmpeft.hosting.host import original_class

Models = Mapping[str, nn.Module | None]
Item = TypeVar("Item", Layer, Shift)
Fuse = Callable[[Sequence[Item], nn.Module], list[Item]]
SDXL = (3, 2)
"""Down blocks of SDXL's UNet, and layers of each: readers' tables of its names are for these."""


def kohya_bytes(
    layers: Collection[Layer],
    component: str,
    models: Models | None = None,
    shifts: Collection[Shift] = (),
    encoders: int = 0,
    marks: Mapping[str, str] | None = None,
) -> bytes:
    """A file of layers and differences; `models` are those of the pipeline that it is for, where they are known.

    All layers have the same alpha, the largest rank: diffusers reads only the most common one for attention.
    `encoders` is how many text encoders the pipeline has, 0 for what `models` tell; `marks` are further metadata.

    Raises:
        Refused: a model that no reader of these files knows, or two layers of the same flat name.
    """
    models = models or {}
    tensors: dict[str, Tensor] = {}
    named = [
        (prefix_of(name, models, encoders), layer)
        for name in sorted({layer.component or component for layer in layers})
        for layer in _by_own_names([x for x in layers if (x.component or component) == name], name, models, _fused)
    ]
    alpha = float(max((layer.rank for _, layer in named), default=1))
    for prefix, layer in named:
        own = layer.baked(alpha)
        name = prefix + own.path.replace(".", "_")
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
    for name in sorted({shift.component or component for shift in shifts}):
        own_shifts = [x for x in shifts if (x.component or component) == name]
        own_shifts = _by_own_names(own_shifts, name, models, original.fused_shifts)
        for shift in own_shifts:
            path = prefix_of(name, models, encoders) + shift.path.replace(".", "_")
            tensors[f"{path}.{_ending(shift, own_shifts)}"] = shift.value
    ranks = {layer.rank for _, layer in named}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    plain = not shifts and not any(layer.tensors for _, layer in named)
    module = "networks.lora" if plain else "lycoris.kohya"
    header = {"ss_network_module": module, "ss_network_dim": dim, "ss_network_alpha": str(alpha)}
    return dump_tensors(tensors, {**header, **(marks or {})})


def prefix_of(component: str, models: Models, encoders: int = 0) -> str:
    """The beginning of the names of one model's layers.

    Raises:
        Refused: no reader knows such a model.
    """
    model = models.get(component)
    if component == "transformer" and model is not None and not _of_diffusers(model):
        return "lycoris_"
    if component in ("unet", "transformer", ""):
        return "lora_unet_"
    if component == "text_encoder_3" or (model is not None and is_t5(model)):
        return "lora_te3_"
    if component == "text_encoder_2":
        return "lora_te2_"
    unet = models.get("unet")
    several = bool({"transformer", "text_encoder_2", "text_encoder_3"} & set(models))
    several = several or getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"
    return "lora_te1_" if (encoders > 1 if encoders else several) else "lora_te_"


def is_t5(model: nn.Module) -> bool:
    """Whether a text encoder is a T5, which files number apart from CLIP's."""
    return "T5" in original_class(model).__name__


def _by_own_names(items: Sequence[Item], component: str, models: Models, fuse: Fuse[Item]) -> list[Item]:
    """Layers or differences of one model, by the names of the code that trains it; `fuse` knows those of diffusers'."""
    model = models.get(component)
    if component != "transformer" or (model is not None and not _of_diffusers(model)):
        names = _sdxl_names(model)
        return [replace(item, path=names.get(item.path, item.path)) for item in items]
    _check_transformer(model)
    assert model is not None
    return fuse(items, model)


def _fused(layers: Sequence[Layer], model: nn.Module) -> list[Layer]:
    """Layers of a transformer by its own names, which know low-rank halves alone."""
    return original.fused([replace(layer, tensors={}) for layer in layers], model)


def _sdxl_names(model: nn.Module | None) -> dict[str, str]:
    """Module → its name in the code that trains SDXL; empty for a UNet of another shape, which has no such name."""
    config = getattr(model, "config", None)
    shape = (len(getattr(config, "down_block_types", ())), getattr(config, "layers_per_block", None))
    if model is None or getattr(config, "addition_embed_type", None) != "text_time" or shape != SDXL:
        return {}
    return {path: name for name, (path,) in original.table_of(model).items()}


def _of_diffusers(model: nn.Module) -> bool:
    return original_class(model).__module__.startswith("diffusers.")


def _check_transformer(model: nn.Module | None) -> None:
    if model is None:
        raise Refused(
            "kohya's files have transformers by the names of their own repositories, which are known for a model "
            "only; give it"
        )
    if original_class(model).__name__ not in original.TABLES:
        raise Refused(
            f"no reader of kohya's files is known to take a {original_class(model).__name__}; write the diffusers "
            "format, which ComfyUI reads for PixArt"
        )


def _ending(shift: Shift, beside: Collection[Shift]) -> str:
    """What the key of a difference ends with: a norm has one of its weight."""
    if any((x.path, x.component, x.tensor) == (shift.path, shift.component, "weight") for x in beside):
        return "w_norm" if shift.tensor == "weight" else "b_norm"
    return "diff_b"
