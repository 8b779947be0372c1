"""The four backbones of the benchmarks, with random weights, and how each library is asked to tune them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft

RANK = 8
METHODS = {"LoRA all": ("LoRA", "all"), "LoRA attention": ("LoRA", "attention"), "DoRA all": ("DoRA", "all")}


@dataclass(frozen=True)
class Family:
    """A backbone, its loss on fixed inputs, and what `all` linears and those of `attention` are called.

    `first` is the parameter whose training alone takes a full forward and a full input-gradient backward pass.
    """

    title: str
    backbone: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    first: str
    ours: dict[str, str]
    peft: dict[str, str]
    device: torch.device

    def fresh(self) -> nn.Module:
        """The backbone, the same weights each time."""
        torch.manual_seed(0)
        return self.backbone().to(self.device).train()

    def floor(self) -> nn.Module:
        model = self.fresh().requires_grad_(False)
        model.get_parameter(self.first).requires_grad_(True)
        return model

    def tuned(self, method: str, recompute: str | None = None) -> nn.Module:
        """By us."""
        kind, part = METHODS[method]
        model = self.fresh()
        chosen = (mmpeft.LoRA if kind == "LoRA" else mmpeft.DoRA)(rank=RANK, alpha=RANK, at=self.ours[part])
        mmpeft.attach(model, chosen).recompute = recompute
        return model

    def peers(self, method: str) -> nn.Module:
        """By HF PEFT. Raises ValueError where it refuses."""
        from peft import LoraConfig, get_peft_model

        kind, part = METHODS[method]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=self.peft[part], use_dora=kind == "DoRA")
        return get_peft_model(self.fresh(), config)


def vit(device: torch.device, quick: bool) -> Family:
    """PEFT tunes the fused qkv by one update, we q, k and v by three."""
    import timm

    name, batch = ("vit_tiny_patch16_224", 1) if quick else ("vit_base_patch16_224", 4)
    images = torch.randn(batch, 3, 224, 224, device=device)
    return Family(
        f"timm {name}, batch {batch}",
        lambda: timm.create_model(name, num_classes=100),
        lambda model: model(images).float().square().mean(),
        "cls_token",
        {"all": "attn.*|mlp.*", "attention": "attn.*"},
        {"all": r"blocks\..*\.(qkv|attn\.proj|fc1|fc2)", "attention": r"blocks\..*\.attn\.(qkv|proj)"},
        device,
    )


def clip(device: torch.device, quick: bool) -> Family:
    """The attention is torch's, which calls none of its projections: PEFT takes in_proj and out_proj together."""
    import open_clip

    batch = 1 if quick else 8
    images = torch.randn(batch, 3, 224, 224, device=device)
    small = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 2, "heads": 4, "mlp_ratio": 4}
    return Family(
        f"open_clip {'a tiny ViT' if quick else 'ViT-B-32'}, image tower, batch {batch}",
        lambda: (
            open_clip.transformer.VisionTransformer(**small) if quick else open_clip.create_model("ViT-B-32").visual
        ),
        lambda model: model(images).float().square().mean(),
        "class_embedding",
        {"all": "attn.*|mlp.*", "attention": "attn.*"},
        {"all": r".*resblocks\.\d+\.(attn|mlp\.c_fc|mlp\.c_proj)", "attention": r".*resblocks\.\d+\.attn"},
        device,
    )


def unet(device: torch.device, quick: bool) -> Family:
    """Stable Diffusion 1.5's layout at a quarter of its widths."""
    from diffusers import UNet2DConditionModel

    size, batch = (8, 1) if quick else (32, 2)
    widths = (16, 16, 32, 32) if quick else (80, 160, 320, 320)
    latents, noise = torch.randn(2, batch, 4, size, size, device=device)
    steps, text = torch.randint(1000, (batch,), device=device), torch.randn(batch, 77, 192, device=device)
    attention = r"to_q|to_k|to_v|to_out\.0"
    return Family(
        f"diffusers UNet of SD 1.5's layout, latents {size}×{size}, batch {batch}",
        lambda: UNet2DConditionModel(
            sample_size=size, block_out_channels=widths, cross_attention_dim=192, attention_head_dim=8,
            norm_num_groups=16,
        ),
        lambda model: F.mse_loss(model(latents, steps, text).sample.float(), noise),
        "conv_in.bias",
        {"all": "attn.*|cross.*|mlp.*", "attention": "attn.*|cross.*"},
        {"all": rf".*\.({attention}|ff\.net\.0\.proj|ff\.net\.2)", "attention": rf".*\.({attention})"},
        device,
    )  # fmt: skip


def llama(device: torch.device, quick: bool) -> Family:
    """Eight layers of width 512, two texts of 256 tokens."""
    length = 16 if quick else 256
    words = torch.randint(1000, (2, length), device=device)
    attention = "q_proj|k_proj|v_proj|o_proj"
    return Family(
        f"transformers Llama, 8 × 512, 2 × {length} tokens",
        small_llama,
        lambda model: model(input_ids=words, labels=words, use_cache=False).loss,
        "model.layers.0.input_layernorm.weight",
        {"all": "attn.*|mlp.*", "attention": "attn.*"},
        {"all": rf".*\.({attention}|gate_proj|up_proj|down_proj)", "attention": rf".*\.({attention})"},
        device,
    )


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            max_position_embeddings=512,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[torch.device, bool], Family]] = {"vit": vit, "clip": clip, "unet": unet, "llama": llama}
