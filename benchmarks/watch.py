"""How long it takes to find a model's sites, and what memory: one watch each, on random weights or the meta device.

python -m benchmarks.watch
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import open_clip
import timm
import torch
import transformers as hf
from diffusers import UNet2DConditionModel
from torch import nn

from mmpeft.sites import load_domains, structure


def llama_70b() -> nn.Module:
    with torch.device("meta"):
        config = hf.LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256,
        )  # fmt: skip
        return hf.LlamaForCausalLM(config)


def stable_diffusion() -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm ViT-B/16": lambda: timm.create_model("vit_base_patch16_224"),
    "timm ConvNeXt-B": lambda: timm.create_model("convnext_base"),
    "timm SwinV2-B": lambda: timm.create_model("swinv2_base_window8_256"),
    "open_clip ViT-B-32": lambda: open_clip.create_model("ViT-B-32"),
    "UNet of SD 1.5 (meta)": stable_diffusion,
    "Llama 70B (meta)": llama_70b,
}


def main() -> None:
    torch.set_num_threads(1)
    load_domains()
    structure(timm.create_model("vit_tiny_patch16_224", depth=1))  # what is imported and compiled once
    print(f"{'model':24} {'parameters':>12} {'sites':>6} {'watch, s':>9} {'again, ms':>10} {'peak memory, MiB':>17}")
    for name, build in MODELS.items():
        model = build()
        size = sum(p.numel() for p in model.parameters())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        found = structure(model)
        first = time.perf_counter()
        structure(model)
        again = time.perf_counter()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        times = f"{first - start:9.2f} {1e3 * (again - first):10.1f}"
        print(f"{name:24} {size / 1e6:10,.0f} M {len(found):6} {times} {grown:17.0f}")


if __name__ == "__main__":
    main()
