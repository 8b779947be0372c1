"""stable-diffusion-webui-forge: `backend/patcher/lora.py` and the tables that it takes from ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.readers.comfyui import clip_names, diffusers_state, native_config, native_map, native_state, parts
from benchmarks.readers.job import Job, Tensors, answer
from benchmarks.readers.stubs import anything, missing, package


def setup(source: Path) -> None:
    sys.path.insert(0, str(source))
    package("backend", str(source / "backend"))
    package("backend.patcher", str(source / "backend" / "patcher"))
    missing("backend", "modules", "gguf")
    for name in ("backend.utils", "backend.operations", "backend.operations_gguf", "backend.operations_bnb"):
        anything(name)
    management = anything("backend.memory_management")
    vars(management)["cast_to_device"] = lambda tensor, device, dtype, copy=False: tensor.to(device, dtype, copy=copy)


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    from backend.patcher import lora
    from packages_3rdparty.comfyui_lora_collection import utils

    part = "unet" if "unet" in job.configs else "transformer"
    table = native_map(utils, job)
    state = native_state(table, base, part)
    name = {"Flux": "black-forest-labs/FLUX.1-dev"}.get(job.kind, "stable-diffusion")
    model = SimpleNamespace(
        state_dict=lambda: state,
        diffusion_model=SimpleNamespace(config=native_config(job)),
        config=SimpleNamespace(huggingface_repo=name),
    )
    texts = clip_names(job, base)
    clip_state = {native: base[name] for name, native in texts.items()}
    keys = lora.model_lora_keys_unet(model, {})
    clip_keys = lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: clip_state), {})
    patches, rest = lora.load_lora(dict(file), keys)
    more, rest = lora.load_lora(rest, clip_keys)
    if len(rest) > 12:
        raise ValueError(f"LoRA version mismatch: {len(rest)} keys match nothing")
    new = {key: tensor.clone() for key, tensor in {**state, **clip_state}.items()}
    for to, patch in {**patches, **more}.items():
        key, offset, function = parts(to)
        if key in new:
            new[key] = lora.merge_lora_to_weight([(1.0, patch, 1.0, offset, function)], new[key], key)
    return diffusers_state(table, base, part, new) | {name: new[native] for name, native in texts.items()}


if __name__ == "__main__":
    setup(Path(sys.argv[2]))
    answer(read)
