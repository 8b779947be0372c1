"""Every denoiser that diffusers exports, with a tiny configuration."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import torch
from torch import nn

DENOISER = re.compile(r"Transformer|UNet|UVit|UniDiffuser|ControlNet|DiT|T5FilmDecoder")
PARTS = re.compile(r"Multi\w*ControlNet|Adapter|Autoencoder|Decoder$(?<!T5FilmDecoder)|Tokenizer")
"""Wrappers of several models, and parts that only another model runs."""

SMALL: dict[str, Any] = {
    "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "n_layers": 2, "n_refiner_layers": 1,
    "num_mmdit_layers": 1, "num_single_dit_layers": 1, "mmdit_layers": 2, "transformer_num_layers": 2, "depth": 2,
    "num_hidden_layers": 2, "num_text_blocks": 1, "num_visual_blocks": 2, "dit_depth": 2,
    "num_attention_heads": 2, "attention_head_dim": 16, "num_key_value_heads": 1, "num_kv_heads": 1, "head_dim": 16,
    "n_heads": 2, "n_kv_heads": 2, "num_heads": 2, "dit_heads": 2, "dim": 32, "hidden_size": 32, "embed_dim": 32,
    "dit_dim": 32, "model_dim": 32, "ff_dim": 64, "ffn_dim": 64, "intermediate_size": 64, "ffn_hidden_size": 64,
    "in_channels": 4, "out_channels": 4, "sample_size": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 4,
    "joint_attention_dim": 32, "cross_attention_dim": 32, "caption_channels": 32, "caption_projection_dim": 32,
    "text_embed_dim": 32, "text_dim": 32, "pooled_projection_dim": 32, "cap_feat_dim": 32, "context_in_dim": 32,
    "time_embed_dim": 32, "freq_dim": 32, "time_dim": 32, "in_text_dim": 32, "in_text_dim2": 32, "dit_text_dim": 32,
    "axes_dims_rope": (4, 6, 6), "rope_axes_dim": (4, 6, 6), "axes_dims": (4, 6, 6), "axes_dim_rope": (4, 6, 6),
    "rope_dim_list": [4, 6, 6], "rope_dim": (4, 6, 6), "max_text_seq_length": 8, "encoder_hidden_size": 32,
    "norm_num_groups": 8, "layers_per_block": 1, "cross_attention_head_dim": 16, "num_cross_attention_heads": 2,
    "condition_dim": 16, "embedding_dim": 32, "pos_embed_max_size": 16,
}  # fmt: skip
"""What a setting of this name becomes in every class that has it and sets it; a class's own row goes before."""

TWO_LEVELS = {"block_out_channels": (16, 32), "attention_head_dim": 8, "conditioning_embedding_out_channels": (8, 8)}


def _levels(down: str, up: str, **more: Any) -> dict[str, Any]:
    """A UNet of two levels, the first with attention."""
    blocks = {"down_block_types": (f"CrossAttn{down}", down), "up_block_types": (up, f"CrossAttn{up}")}
    return {**TWO_LEVELS, **blocks, **more}


FLUX = {"in_channels": 16}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": _levels("DownBlock2D", "UpBlock2D"),
}


def names() -> list[str]:
    """Denoisers of the installed diffusers."""
    found = [n for n in dir(diffusers) if DENOISER.search(n) and not PARTS.search(n) and _is_model(n)]
    return sorted(found)


def build(name: str) -> nn.Module:
    """The class with a tiny configuration and random weights, the same in every call."""
    cls = getattr(diffusers, name)
    own = CONFIGURATIONS.get(name, {})
    given = inspect.signature(cls.__init__).parameters
    small = {key: value for key, value in SMALL.items() if key in given and given[key].default is not None}
    torch.manual_seed(0)
    model = cls(**{key: value for key, value in {**small, **own}.items() if value is not ...})
    return model  # type: ignore[no-any-return]


def _is_model(name: str) -> bool:
    try:
        found = getattr(diffusers, name)
    except (AttributeError, RuntimeError, ImportError):
        return False
    return inspect.isclass(found) and issubclass(found, diffusers.ModelMixin)
