"""diffusers: `load_lora_weights` of the pipeline, its LoRA merged."""

from __future__ import annotations

from typing import Any

from benchmarks.readers.job import Job, NotTried, Tensors, answer
from benchmarks.readers.models import own, parts

PIPELINES = {
    "SD 1.5": "StableDiffusionLoraLoaderMixin",
    "SDXL": "StableDiffusionXLLoraLoaderMixin",
    "SD3": "SD3LoraLoaderMixin",
    "Flux": "FluxLoraLoaderMixin",
}


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    import importlib

    from peft.tuners.tuners_utils import BaseTunerLayer

    from benchmarks.readers.cases import models_of

    if job.kind not in PIPELINES:
        raise ValueError(f"no loader of LoRA for {job.kind}")
    if (job.kind, job.format) == ("Flux", "kohya"):
        raise NotTried("its converter has the width of the published model written into it")
    mixin: Any = getattr(importlib.import_module("diffusers.loaders.lora_pipeline"), PIPELINES[job.kind])
    models = models_of(job.kind)
    for part, model in models.items():
        model.load_state_dict(own(base, part))
    pipeline = type("Pipeline", (mixin,), {"components": {}, "hf_device_map": None})()
    vars(pipeline).update(models)
    pipeline.load_lora_weights(dict(file))
    found: Tensors = {}
    for part in parts(base):
        for module in models[part].modules():
            if isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=False)
        for name, tensor in models[part].state_dict().items():
            if "lora_" not in name:
                found[f"{part}.{name.replace('.base_layer', '')}"] = tensor
    return {name: tensor for name, tensor in found.items() if name in base}


if __name__ == "__main__":
    answer(read)
