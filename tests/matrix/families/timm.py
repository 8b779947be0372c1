"""Tiny timm backbones of every family, built from the real classes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn

from tests.matrix.example import BATCH, Example
from tests.support.copies import copies

CLASSES = 5


def _build(cls: type[nn.Module], size: int = 32, **kwargs: Any) -> Example:
    """A model and a batch; gates, biases and norms get values of their own, so that no test passes on a zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(num_classes=CLASSES, **kwargs).eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                if name.startswith("head") and parameter.dim() == 2:
                    parameter.normal_(std=0.3)  # some families start with a head of nearly zero
                elif "gamma" in name:
                    parameter.fill_(0.5)
                elif cls is ConvNeXt and parameter.dim() > 1:
                    # timm's std of 0.02 lets all images look alike after four narrow stages
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                elif parameter.dim() <= 1 and "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
                elif parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif parameter.dim() == 2 and "bias_table" not in name:
                    parameter.mul_(3)
        return Example(model, torch.randn(BATCH, 3, size, size))


_VIT = partial(_build, VisionTransformer, img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
_EVA = partial(_build, Eva, img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
_ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}

_BUILDERS: dict[str, Callable[[], Example]] = {
    "vit": _VIT,
    "dinov2": partial(_VIT, reg_tokens=2, init_values=0.5, no_embed_class=True),
    "deit3": partial(_VIT, init_values=0.5, no_embed_class=True, global_pool="avg", qkv_bias=False),
    "siglip": partial(_VIT, class_token=False, global_pool="map"),
    "clip": partial(_VIT, pre_norm=True, act_layer="quick_gelu"),
    "vit_qknorm": partial(_VIT, qk_norm=True, class_token=False, global_pool="avg", final_norm=False, fc_norm=True),
    "vit_postnorm": partial(_VIT, block_fn=ResPostBlock, class_token=False, global_pool="avg"),
    "vit_parallel": partial(_VIT, block_fn=ParallelScalingBlock, qk_norm=True),
    "eva": partial(_EVA, init_values=0.5, swiglu_mlp=False),
    "eva02": partial(_EVA, swiglu_mlp=True, use_rot_pos_emb=True),
    "eva02_unfused": partial(_EVA, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, qkv_fused=False),
    "dinov3": partial(
        _EVA, **_ROPE, qkv_bias=False, init_values=0.5, num_reg_tokens=4, rope_rotate_half=True, rope_type="dinov3"
    ),
    "rope_vit": partial(
        _EVA, use_rot_pos_emb=True, num_reg_tokens=1, class_token=False, global_pool="avg", init_values=0.5
    ),
    "beit": partial(
        _build,
        Beit,
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        init_values=0.5,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    ),
    "swin": partial(
        _build,
        SwinTransformer,
        img_size=32,
        patch_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
    ),
    "swinv2": partial(
        _build,
        SwinTransformerV2,
        img_size=32,
        patch_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
    ),
    "convnext": partial(_build, ConvNeXt, depths=(1, 1, 2, 1), dims=(8, 12, 16, 16), ls_init_value=0.5),
}

FAMILIES = copies(_BUILDERS)
SHALLOW = copies({name: partial(_BUILDERS[name], depth=2) for name in ("vit", "beit", "eva02")})
"""Those that are compiled, which takes a second a block."""
