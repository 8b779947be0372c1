"""A LoRA we export loads in a `StableDiffusionPipeline` and changes the image exactly as ours does."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

import mmpeft
from tests.matrix.families.diffusers import FAMILIES, TEXT, WORDS

METHODS = {
    "attention": mmpeft.LoRA(rank=2, alpha=8, at="attn.*|cross.*"),
    "all": mmpeft.LoRA(rank=4, alpha=2, at="attn.*|mlp.*|conv", rank_pattern={"conv": 2}),
    "dora": mmpeft.DoRA(rank=2, at="attn.*|cross.*"),
}


def _pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    return StableDiffusionPipeline(
        unet=FAMILIES["sd_unet"]().model,
        vae=vae,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _image(pipeline: StableDiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    prompt, nothing = torch.randn(2, 1, WORDS, TEXT, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=nothing,
        num_inference_steps=3,
        output_type="np",
        generator=generator,
    ).images[0]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_image(name: str, format: str, tmp_path: Path) -> None:
    if (name, format) == ("dora", "kohya"):
        pytest.skip("diffusers drops dora_scale from kohya files")
    pipeline = _pipeline()
    plain = _image(pipeline)
    theirs = copy.deepcopy(pipeline)
    tuning = mmpeft.attach(pipeline.unet, METHODS[name])
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    ours = _image(pipeline)
    written = tuning.export(tmp_path / "pytorch_lora_weights.safetensors", format)
    theirs.load_lora_weights(written.path)
    assert np.abs(ours - plain).max() > 1e-2
    np.testing.assert_allclose(_image(theirs), ours, atol=1e-5)
