"""The liveness table on timm backbones where adapters of the qkv projection commonly train nothing.

    python benchmarks/liveness.py

Random weights; SwinV2's residual post-norms, which start at zero and would make any gradient vanish, are set to one
and EVA's and BEiT's LayerScale to 0.5, as after pretraining. Beside ours: how many of HF PEFT's tensors get a gradient.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import mmpeft

NAMES = (
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "swinv2_tiny_window8_256",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_base_patch16_224",
)


def backbone(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights whose every branch carries a signal, and one image."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.fill_(0.5)
            elif "norm" in key and key.endswith("weight"):
                parameter.fill_(1.0)
            elif key.startswith("head") and parameter.dim() == 2:
                parameter.normal_(std=0.02)
    return model, torch.randn(1, 3, *model.default_cfg["input_size"][1:])


def peft_alive(name: str) -> str:
    """`alive/all` of PEFT's trainable tensors after two steps."""
    from peft import LoraConfig, get_peft_model

    model, x = backbone(name)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["qkv"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    norms = [0.0] * len(parameters)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        if not loss.requires_grad:  # the adapters never enter the graph
            break
        loss.backward()
        norms = [max(n, 0.0 if p.grad is None else float(p.grad.norm())) for n, p in zip(norms, parameters)]
        optimizer.step()
    return f"{sum(n > 0 for n in norms)}/{len(norms)}"


def main() -> None:
    print(
        f"{'backbone':40}{'LoRA qkv':>10}{'LoRA all':>10}{'DoRA qkv':>10}{'BitFit':>9}{'Adapter+':>10}{'PEFT qkv':>10}"
    )
    methods = (
        mmpeft.LoRA(at="attn.{q,k,v}"),
        mmpeft.LoRA(at="attn.*|mlp.*"),
        mmpeft.DoRA(at="attn.{q,k,v}"),
        mmpeft.BitFit(),
        mmpeft.AdapterPlus(),
    )
    for name in NAMES:
        cells = []
        for method in methods:
            model, x = backbone(name)
            found = mmpeft.attach(model, method).liveness(x)
            assert not found.moved, found.moved
            cells.append(f"{len(found.pulses) - len(found.dead)}/{len(found.pulses)}")
        print(
            f"{name:40}{cells[0]:>10}{cells[1]:>10}{cells[2]:>10}{cells[3]:>9}{cells[4]:>10}{peft_alive(name):>10}",
            flush=True,
        )


if __name__ == "__main__":
    main()
