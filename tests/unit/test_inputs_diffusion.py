"""Example inputs are accepted by denoisers of every layout: images, tokens, videos, sounds, conditions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from mmpeft.diffusion.inputs import example_inputs
from tests.zoo import diffusers_models

LAYOUTS = {
    "FluxTransformer2DModel": (2, 16, 4),
    "SD3Transformer2DModel": (2, 4, 8, 8),
    "WanTransformer3DModel": (2, 4, 4, 8, 8),
    "CogVideoXTransformer3DModel": (2, 4, 4, 8, 8),
    "StableAudioDiTModel": (2, 4, 16),
    "HunyuanDiT2DModel": (2, 4, 8, 8),
    "LTXVideoTransformer3DModel": (2, 64, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str) -> None:
    kwargs = _accepted(diffusers_models.build(name))
    assert kwargs["hidden_states"].shape == LAYOUTS[name]


CONDITIONS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "kandinsky": {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 24, "addition_embed_type": "image"},
    "classes": {"num_class_embeds": 5},
    "noise levels": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
    "consistency": {"time_cond_proj_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_a_unet_is_told(name: str) -> None:
    torch.manual_seed(0)
    built = diffusers_models.unet("DownBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(**built, cross_attention_dim=32, norm_num_groups=8, layers_per_block=1,
                                attention_head_dim=2, **CONDITIONS[name])  # fmt: skip
    kwargs = _accepted(unet)
    told = kwargs.keys() & {"added_cond_kwargs", "class_labels", "timestep_cond"}
    assert len(told) == 1


def test_a_control_image_has_the_scale_of_its_embedding() -> None:
    kwargs = _accepted(diffusers_models.build("ControlNetModel"))
    assert kwargs["controlnet_cond"].shape[-1] == 8 * kwargs["sample"].shape[-1]


def test_parts_and_strangers_have_none() -> None:
    model = diffusers_models.build("SD3Transformer2DModel")
    assert example_inputs(model.transformer_blocks[0]) is None
    assert example_inputs(nn.Linear(2, 2)) is None


def _accepted(model: nn.Module) -> dict[str, Any]:
    found = example_inputs(model)
    assert found is not None
    args, kwargs = found
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    return kwargs
