"""Tiny models of diffusers' families, built from the real classes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from tests.matrix.example import BATCH, Example, enliven
from tests.support.copies import copies

TEXT, WORDS, POOLED = 12, 5, 10
"""Channels of a context token, tokens of a context, channels of the pooled context."""


def _build(cls: Callable[..., Any], inputs: Callable[[], dict[str, Any]], **config: Any) -> Example:
    """A model and keyword arguments for it; what starts at zero or one gets values of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(**config).eval()
        enliven(model)
        return Example(model, inputs())


def _map(channels: int) -> Tensor:
    return torch.randn(BATCH, channels, 8, 8)


def _times() -> Tensor:
    return torch.tensor([3, 250, 611, 998])


def _context() -> Tensor:
    return torch.randn(BATCH, WORDS, TEXT)


def _unet_inputs() -> dict[str, Any]:
    return {"sample": _map(3), "timestep": _times(), "class_labels": torch.arange(BATCH)}


def _sd_inputs() -> dict[str, Any]:
    return {"sample": _map(4), "timestep": _times(), "encoder_hidden_states": _context()}


def _sdxl_inputs() -> dict[str, Any]:
    added = {"text_embeds": torch.randn(BATCH, POOLED), "time_ids": torch.randint(0, 64, (BATCH, 6)).float()}
    return {**_sd_inputs(), "added_cond_kwargs": added}


def _dit_inputs() -> dict[str, Any]:
    return {"hidden_states": _map(4), "timestep": _times(), "class_labels": torch.arange(BATCH)}


def _pixart_inputs() -> dict[str, Any]:
    return {"hidden_states": _map(4), "encoder_hidden_states": _context(), "timestep": _times()}


def _sd3_inputs() -> dict[str, Any]:
    return {**_pixart_inputs(), "pooled_projections": torch.randn(BATCH, POOLED)}


def _flux_inputs() -> dict[str, Any]:
    """Packed latents of 4 × 3 patches. The positions of patches and words have no row of their own a sample."""
    patches = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(3.0))
    return {
        "hidden_states": torch.randn(BATCH, len(patches), 4),
        "encoder_hidden_states": _context(),
        "pooled_projections": torch.randn(BATCH, POOLED),
        "timestep": _times() / 1000,
        "guidance": torch.tensor([1.0, 2.0, 3.5, 7.0]),
        "img_ids": patches,
        "txt_ids": torch.zeros(WORDS, 3),
    }


_UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
SD_UNET = partial(
    _build, UNet2DConditionModel, inputs=_sd_inputs, **_UNET, cross_attention_dim=TEXT, attention_head_dim=2
)
_DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
_PATCHES = {**_DIT, "sample_size": 8, "patch_size": 2, "in_channels": 4}
SD3 = partial(
    _build,
    SD3Transformer2DModel,
    _sd3_inputs,
    **{**_PATCHES, "num_layers": 3},
    joint_attention_dim=TEXT,
    caption_projection_dim=16,
    pooled_projection_dim=POOLED,
    out_channels=4,
    pos_embed_max_size=8,
)

FAMILIES: dict[str, Callable[[], Example]] = copies(
    {
        "unet2d": partial(
            _build,
            UNet2DModel,
            _unet_inputs,
            **_UNET,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            num_class_embeds=BATCH,
        ),
        "sd_unet": partial(
            SD_UNET,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "sdxl_unet": partial(
            SD_UNET,
            inputs=_sdxl_inputs,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + POOLED,
        ),
        "dit": partial(
            _build, DiTTransformer2DModel, _dit_inputs, **_PATCHES, num_embeds_ada_norm=BATCH, out_channels=8
        ),
        "pixart": partial(
            _build,
            PixArtTransformer2DModel,
            _pixart_inputs,
            **_PATCHES,
            caption_channels=TEXT,
            cross_attention_dim=16,
            out_channels=8,
        ),
        "sd3": partial(SD3, qk_norm="rms_norm", dual_attention_layers=(0,)),  # as SD3.5 medium
        "flux": partial(
            _build,
            FluxTransformer2DModel,
            _flux_inputs,
            **_DIT,
            in_channels=4,
            num_single_layers=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=POOLED,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
    }
)
