"""ComfyUI: `comfy/lora.py` and `comfy/weight_adapter`, on models under the names that its own tables give them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.readers.job import Job, Tensors, answer
from benchmarks.readers.stubs import anything

NAME = "ComfyUI"
FOLDER = "ComfyUI"
TABLES = {"SD3": "mmdit_to_diffusers", "Flux": "flux_to_diffusers", "PixArt": "pixart_to_diffusers"}


def setup(source: Path) -> None:
    sys.path.insert(0, str(source))
    given, sys.argv = sys.argv, sys.argv[:1]  # ComfyUI reads the command line
    management = ModuleType("comfy.model_management")
    vars(management)["cast_to_device"] = lambda tensor, device, dtype, copy=False: tensor.to(device, dtype, copy=copy)
    sys.modules["comfy.model_management"] = management
    base = anything("comfy.model_base")
    import comfy
    import comfy.utils

    comfy.model_management, comfy.model_base = management, base
    sys.argv = given


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """What ComfyUI's detection says of such a UNet."""
    layers, widths = config["layers_per_block"], config["block_out_channels"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    attended = ["CrossAttn" in name for name in config["down_block_types"]]
    down = [depth if yes else 0 for depth, yes in zip(depths, attended) for _ in range(layers)]
    up = [depth if yes else 0 for depth, yes in zip(depths, attended) for _ in range(layers + 1)]
    return {
        "num_res_blocks": [layers] * len(widths),
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": down,
        "transformer_depth_output": up,
        "transformer_depth_middle": depths[-1],
    }


def native_map(utils: Any, job: Job) -> dict[str, Any]:
    """diffusers' name of a denoiser's tensor → ComfyUI's, perhaps with the rows of it and how they are turned."""
    config = job.configs.get("unet") or job.configs["transformer"]
    if job.kind not in TABLES:
        table = utils.unet_to_diffusers(unet_config(config))
        return {name: f"diffusion_model.{to}" for name, to in table.items()}
    return dict(getattr(utils, TABLES[job.kind])(native_config(job), output_prefix="diffusion_model."))


def native_config(job: Job) -> dict[str, Any]:
    config = job.configs.get("transformer", {})
    if job.kind in TABLES:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        single = config.get("num_single_layers", 0)
        return {"depth": config["num_layers"], "depth_single_blocks": single, "hidden_size": width}
    return unet_config(job.configs["unet"])


def clip_names(job: Job, base: Tensors) -> dict[str, str]:
    """diffusers' name of a text encoder's tensor → ComfyUI's."""
    found = {}
    encoders = sorted({name.partition(".")[0] for name in base if name.startswith("text_encoder")})
    for name in base:
        part, _, path = name.partition(".")
        if part not in encoders:
            continue
        if ".SelfAttention" in path or path.startswith(("encoder.block", "shared")):
            found[name] = f"t5xxl.transformer.{path}"
        else:
            clip = "clip_l" if part == "text_encoder" else "clip_g"
            inner = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
            found[name] = f"{clip}.transformer.{inner}"
    return found


def parts(to: Any) -> tuple[str, Any, Any]:
    """(name, offset, function) of an entry of ComfyUI's tables."""
    if isinstance(to, str):
        return to, None, None
    return to[0], to[1] if len(to) > 1 else None, to[2] if len(to) > 2 else None


class _Model:
    def __init__(self, state: Tensors, config: dict[str, Any]) -> None:
        self.state, self.model_config = state, SimpleNamespace(unet_config=config)

    def state_dict(self) -> Tensors:
        return self.state


def native_state(table: dict[str, Any], base: Tensors, part: str) -> Tensors:
    """The denoiser's tensors under ComfyUI's names, those of fused modules as one."""
    import torch

    whole: dict[str, list[tuple[int, Any]]] = {}
    for name, to in table.items():
        own = base.get(f"{part}.{name}")
        if own is None:
            continue
        key, offset, function = parts(to)
        whole.setdefault(key, []).append((offset[1] if offset else 0, function(own) if function else own))
    return {key: torch.cat([t for _, t in sorted(found, key=lambda x: x[0])]) for key, found in whole.items()}


def diffusers_state(table: dict[str, Any], base: Tensors, part: str, new: Tensors) -> Tensors:
    """The denoiser's tensors by diffusers' names again, those of fused modules apart."""
    changed: Tensors = {}
    for name, to in table.items():
        if f"{part}.{name}" in base:
            key, offset, function = parts(to)
            own = new[key].narrow(*offset) if offset else new[key]
            changed[f"{part}.{name}"] = function(own) if function else own
    return changed


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import comfy.utils

    part = "unet" if "unet" in job.configs else "transformer"
    table = native_map(comfy.utils, job)
    state = native_state(table, base, part)
    kinds = (getattr(comfy.model_base, job.kind), _Model) if job.kind in TABLES else (_Model,)
    model = type("Model", kinds, {})(state, native_config(job))
    texts = clip_names(job, base)
    clip = _Model({native: base[name] for name, native in texts.items()}, {})
    keys = comfy.lora.model_lora_keys_unet(model, {})
    keys = comfy.lora.model_lora_keys_clip(clip, keys)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), keys, log_missing=False)
    new = {key: tensor.clone() for key, tensor in {**state, **clip.state}.items()}
    for to, patch in patches.items():
        key, offset, function = parts(to)
        if key in new:  # as the patcher leaves out what the model has not
            new[key] = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], new[key], key)
    return diffusers_state(table, base, part, new) | {name: new[native] for name, native in texts.items()}


if __name__ == "__main__":
    setup(Path(sys.argv[2]))
    answer(read)
