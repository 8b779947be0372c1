"""kohya's sd-scripts: the networks of `networks/lora*.py`, made from a file on trees of the modules they look for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.readers.job import Job, Tensors, answer
from benchmarks.readers.models import all_back, denoiser_tree, is_t5, own, parts, text_tree
from benchmarks.readers.stubs import missing
from benchmarks.readers.unet_names import sdxl_name

CLIP = {f"text_model.encoder.layers.{i}.self_attn": "CLIPAttention" for i in range(2)}
CLIP |= {f"text_model.encoder.layers.{i}.mlp": "CLIPMLP" for i in range(2)}
T5 = {f"encoder.block.{i}.layer.0.SelfAttention": "T5Attention" for i in range(2)}
T5 |= {f"encoder.block.{i}.layer.1.DenseReluDense": "T5DenseGatedActDense" for i in range(2)}


def setup(source: Path) -> None:
    sys.path.insert(0, str(source))
    missing("toml", "voluptuous", "imagesize", "cv2", "bitsandbytes", "library", "tqdm", "albumentations", "ftfy")


def classed(root: Any, job: Job) -> Any:
    """Class names that the networks look for."""
    from torch import nn

    for name, module in root.named_modules():
        *above, last = name.split(".")
        kind = ""
        if last.isdigit() and above and above[-1] in ("double_blocks", "single_blocks"):
            kind = "DoubleStreamBlock" if above[-1] == "double_blocks" else "SingleStreamBlock"
        elif last in ("x_block", "context_block"):
            kind = "SingleDiTBlock"
        elif "transformer_blocks" in module._modules:
            kind = "Transformer2DModel"
        elif {"conv1", "conv2"} <= set(module._modules) or {"in_layers", "out_layers"} <= set(module._modules):
            kind = "ResnetBlock2D"
        elif set(module._modules) in ({"op"}, {"conv"}):
            kind = "Downsample2D"
        if kind:
            module.__class__ = type(kind, (nn.Module,), {})
    return root


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    import torch
    from networks import lora, lora_flux, lora_sd3

    network = {"SD3": lora_sd3, "Flux": lora_flux}.get(job.kind, lora)
    root, back = denoiser_tree(job, base, sdxl_name(job) if job.kind == "SDXL" else None)
    root = classed(root, job)
    if job.kind == "SDXL":
        root.__class__ = type("SDXL", (lora.SdxlUNet2DConditionModel,), {})
    texts = {}
    for part in (part for part in parts(base) if part.startswith("text")):
        tensors = own(base, part)
        texts[part] = text_tree(tensors, T5 if is_t5(tensors) else CLIP)
    given = list(texts.values()) if len(texts) > 1 else next(iter(texts.values()))
    with torch.no_grad():
        made, file = network.create_network_from_weights(1.0, None, None, given, root, weights_sd=dict(file))
        found = made.unet_loras + made.text_encoder_loras
        for module in found:
            made.add_module(module.lora_name, module)
        made.load_state_dict(file, False)
        for module in found:
            weight = module.org_module.weight if hasattr(module, "org_module") else None
            assert weight is not None
            up, down = module.lora_up.weight.flatten(1), module.lora_down.weight.flatten(1)
            weight += (up @ down).view(weight.shape) * module.scale
    return all_back(back, texts, base)


if __name__ == "__main__":
    setup(Path(sys.argv[2]))
    answer(read)
