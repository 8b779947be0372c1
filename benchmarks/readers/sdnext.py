"""SD.Next: `load_safetensors` of `modules/lora`, its conversions and its network classes, on diffusers' own names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.readers.applied import apply
from benchmarks.readers.job import Job, NotTried, Tensors, answer
from benchmarks.readers.models import own, parts, text_tree
from benchmarks.readers.stubs import missing, package
from benchmarks.readers.tree import tree

TYPES = {"SD 1.5": "sd", "SDXL": "sdxl", "SD3": "sd3", "Flux": "f1"}


def setup(source: Path) -> None:
    package("modules", str(source / "no such folder"))
    package("modules.lora", str(source / "modules" / "lora"))
    missing("modules", "gradio", "rich", "installer")
    import modules.devices
    import modules.logger
    import modules.shared
    import torch

    quiet = SimpleNamespace(**dict.fromkeys(("debug", "error", "warning", "trace", "info"), lambda *a, **k: None))
    vars(modules.logger)["log"] = quiet
    vars(modules.devices).update(cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=torch.float32)
    options = {"lora_fuse_native": False, "lora_fuse_diffusers": False, "extra_networks_default_multiplier": 1.0}
    vars(modules.shared).update(opts=SimpleNamespace(**options), sd_loaded=True, log=quiet)


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    import modules.sd_models
    import modules.shared
    from modules.lora import lora_load

    if (job.kind, job.format) == ("Flux", "kohya"):
        raise NotTried("its converter has the width of the published model written into it")
    trees: dict[str, Any] = {}
    for part in parts(base):
        trees[part] = text_tree(own(base, part)) if part.startswith("text") else tree(own(base, part))
    modules.shared.sd_model = SimpleNamespace(**trees)
    modules.shared.sd_model_type = TYPES[job.kind]
    modules.sd_models.read_state_dict = lambda name, what=None: dict(file)
    lora_load.lora_cache.clear()
    net = lora_load.load_safetensors("file", SimpleNamespace(filename=job.file))
    if net is None:
        raise ValueError("no key matched")
    apply(net.modules)
    found: Tensors = {}
    for part, root in trees.items():
        for name, tensor in root.named_parameters():
            bare = name.removeprefix("text_model.") if part.startswith("text") else name
            found[f"{part}.{name}" if f"{part}.{name}" in base else f"{part}.{bare}"] = tensor
    return found


if __name__ == "__main__":
    setup(Path(sys.argv[2]))
    answer(read)
