"""stable-diffusion-webui (A1111): `load_network` of its Lora extension and its network classes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.readers.applied import apply
from benchmarks.readers.job import Job, NotTried, Tensors, answer
from benchmarks.readers.models import all_back, denoiser_tree, own, parts, text_tree
from benchmarks.readers.stubs import anything, missing
from benchmarks.readers.unet_names import sdxl_name


def setup(source: Path) -> None:
    import torch

    sys.path.insert(0, str(source / "extensions-builtin" / "Lora"))
    missing("modules", "gradio", "lora_patches", "lora_logger")
    anything("modules")
    devices = vars(anything("modules.devices"))
    devices.update(cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=torch.float32)
    for name in ("modules.models", "modules.models.sd3"):
        anything(name)
    vars(anything("modules.models.sd3.mmdit"))["QkvLinear"] = type("QkvLinear", (), {})
    empty = tempfile.mkdtemp()
    options = SimpleNamespace(lora_in_memory_limit=0)
    folders = SimpleNamespace(lora_dir=empty, lyco_dir_backcompat=empty)
    shared = vars(anything("modules.shared"))
    shared.update(cmd_opts=folders, opts=options, walk_files=lambda *folders, **options: [])


class _Model(SimpleNamespace):
    pass


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    import networks
    from torch import nn

    if job.kind == "SDXL" and "text_encoder_2" in job.configs:
        raise NotTried("its second text encoder is open_clip's, which is not built here")
    networks._is_openclip_attention = lambda module: False  # the classes are of a later version than the loader
    unet, back = denoiser_tree(job, base, sdxl_name(job))
    texts = {part: text_tree(own(base, part)) for part in parts(base) if part == "text_encoder"}
    wrapped = nn.Module()
    wrapped.add_module("transformer", texts["text_encoder"])
    clip = nn.Module()
    clip.wrapped = wrapped
    model = nn.Module()
    model.add_module("diffusion_model", unet)
    given = _Model(is_sdxl=job.kind == "SDXL", model=model, cond_stage_model=clip)
    given.conditioner = SimpleNamespace(embedders=[clip])
    networks.shared.sd_model = given
    networks.sd_models.read_state_dict = lambda name: file
    networks.assign_network_names_to_compvis_modules(given)
    net: Any = networks.load_network("file", SimpleNamespace(filename=job.file))
    apply(net.modules)
    return all_back(back, texts, base)


if __name__ == "__main__":
    setup(Path(sys.argv[2]))
    answer(read)
