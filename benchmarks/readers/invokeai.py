"""InvokeAI: its conversions of a file's names, its layers, and its search for the module that a flat name means."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from benchmarks.readers.job import Job, NotTried, Tensors, answer
from benchmarks.readers.stubs import anything, missing, package
from benchmarks.readers.tree import tree

CACHE = "invokeai.backend.model_manager.load.model_cache.torch_module_autocast"
TEXT = {"SD 1.5": {"text_encoder": "lora_te_"}, "SDXL": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}}
"""What InvokeAI's invocations of each base pass as the beginnings of names."""


def setup(source: Path) -> None:
    for name in ("invokeai", "invokeai.backend", "invokeai.backend.patches", "invokeai.backend.util"):
        package(name, str(source.joinpath(*name.split("."))))
    missing("invokeai")
    for name in ("invokeai.backend.util.logging", "invokeai.backend.util.devices", "invokeai.backend.model_manager"):
        anything(name)
    vars(anything(f"{CACHE}.cast_to_device"))["cast_to_device"] = lambda tensor, device, dtype=None: tensor
    said = vars(sys.modules["invokeai.backend.util.logging"])
    said |= {"warning": print, "InvokeAILogger": type("InvokeAILogger", (), {"get_logger": logging.getLogger})}
    vars(anything("invokeai.backend.raw_model"))["RawModel"] = object


def layers_of(job: Job, file: Tensors) -> tuple[dict[str, Any], dict[str, str], bool]:
    """InvokeAI's layers of a file by key, the beginnings of keys by component, and whether keys are flat."""
    from invokeai.backend.patches.lora_conversions import flux_bfl_peft_lora_conversion_utils as bfl
    from invokeai.backend.patches.lora_conversions import flux_diffusers_lora_conversion_utils as peft
    from invokeai.backend.patches.lora_conversions import flux_kohya_lora_conversion_utils as kohya
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import lora_model_from_sd_state_dict
    from invokeai.backend.patches.lora_conversions.sdxl_lora_conversion_utils import (
        convert_sdxl_keys_to_diffusers_format,
    )

    if job.kind in TEXT:
        file = convert_sdxl_keys_to_diffusers_format(file) if job.kind == "SDXL" else file
        return lora_model_from_sd_state_dict(file).layers, {"unet": "lora_unet_", **TEXT[job.kind]}, True
    if job.kind == "Flux":
        starts = {"transformer": "lora_transformer-", "text_encoder": "lora_clip-", "text_encoder_2": "lora_t5-"}
        if kohya.is_state_dict_likely_in_flux_kohya_format(file):
            return kohya.lora_model_from_flux_kohya_state_dict(file).layers, starts, False
        if peft.is_state_dict_likely_in_flux_diffusers_format(file):
            raise NotTried("its converter has the width of the published model written into it")
        if bfl.is_state_dict_likely_in_flux_bfl_peft_format(file):
            return bfl.lora_model_from_flux_bfl_peft_state_dict(file).layers, starts, False
        raise ValueError("no format of Flux files that it knows")
    raise ValueError(f"InvokeAI has no LoRA for {job.kind}")


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    from invokeai.backend.patches.layer_patcher import LayerPatcher

    layers, starts, flat = layers_of(job, file)
    changed: Tensors = {}
    for part, start in starts.items():
        own = {name.removeprefix(f"{part}."): t for name, t in base.items() if name.startswith(f"{part}.")}
        if part.startswith("text") and not any("SelfAttention" in name for name in own):
            own = {name if name.startswith("text") else f"text_model.{name}": t for name, t in own.items()}
        names = dict(own)
        if part == "transformer":
            own, back = bfl_state(job, base)
            names = dict(own)
        model = tree(own)
        new = {name: tensor.clone() for name, tensor in own.items()}
        for key, layer in layers.items():
            if key.startswith(start):
                path, module = LayerPatcher._get_submodule(model, key[len(start) :], layer_key_is_flattened=flat)
                parameters = dict(module.named_parameters(recurse=False))
                for name, change in layer.get_parameters(parameters, weight=1.0).items():
                    new[f"{path}.{name}"] += change.detach()
        if part == "transformer":
            changed |= back(new)
            continue
        for name in names:
            key = f"{part}.{name}"
            changed[key if key in base else f"{part}.{name.removeprefix('text_model.')}"] = new[name]
    return changed


def bfl_state(job: Job, base: Tensors) -> tuple[Tensors, Any]:
    """The transformer by the names of its own repository, and the way back; by ComfyUI's table of them."""
    from benchmarks.readers.flux_names import back, native

    return native(job, base), lambda new: back(job, base, new)


if __name__ == "__main__":
    setup(Path(sys.argv[2]))
    answer(read)
