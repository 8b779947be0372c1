"""The pixel pipeline and its text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel, UNet2DConditionModel

import mmpeft
from mmpeft.diffusion.backbone import INDEX, create
from mmpeft.diffusion.data.emoji import spread
from mmpeft.diffusion.pipeline import PixelPipeline
from mmpeft.diffusion.text import text_encoder
from mmpeft.embedded import emoji
from mmpeft.embedded.captions import captions
from mmpeft.embedded.store import WEIGHTS
from mmpeft.errors import ConfigError, DataError
from tests.support.shares import of_today
from tests.tasks.small_judge import small_judge

PAIR = WEIGHTS / "clip_emoji"
SHIPPED = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{INDEX}"))


def denoisers() -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=192,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=16,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        caption_channels=192,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return {"unet": unet, "transformer": transformer}


def pipeline(kind: str) -> PixelPipeline:
    encoder, tokenizer = text_encoder(PAIR)
    made = PixelPipeline(FlowMatchEulerDiscreteScheduler(), encoder, tokenizer, **{kind: denoisers()[kind]})
    made.set_progress_bar_config(disable=True)
    return made


def test_the_text_encoder_is_the_pairs_text_tower() -> None:
    from mmpeft.vla import backbone

    model: Any = backbone.create("embedded:clip_emoji").eval()
    texts = ["a drawing of a cat", "flag: Norway", ""]
    tokens = backbone.tokenizer("embedded:clip_emoji")(texts)
    with torch.no_grad():
        x = model.token_embedding(tokens) + model.positional_embedding
        expected = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        encoder, tokenizer = text_encoder(PAIR)
        ids = tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, tokens)
        torch.testing.assert_close(encoder(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_a_saved_pipeline_draws_the_same(kind: str, tmp_path: Path) -> None:
    made = pipeline(kind)
    noise = torch.randn(2, 3, 16, 16)
    first = made(["a cat", "a red car"], num_inference_steps=3, latents=noise, output_type="pt").images
    assert first.shape == (2, 3, 16, 16)
    made.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    back = PixelPipeline.from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    again = back(["a cat", "a red car"], num_inference_steps=3, latents=noise, output_type="pt").images
    torch.testing.assert_close(first, again, atol=1e-5, rtol=1e-4)
    alone = back("a red car", num_inference_steps=3, latents=noise[1:], output_type="pt").images
    torch.testing.assert_close(again[1:], alone, atol=1e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(1)
    assert back("a cat", num_inference_steps=1, generator=generator).images[0].size == (16, 16)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_padding_is_not_looked_at(kind: str) -> None:
    made = pipeline(kind)
    text, mask = made.encode_prompt(["a cat"])
    noisy, steps = torch.randn(1, 3, 16, 16), torch.tensor([300.0])
    with torch.no_grad():
        first = made.predict(noisy, steps, text, mask)
        other = torch.where(mask[..., None].bool(), text, torch.randn_like(text))
        torch.testing.assert_close(made.predict(noisy, steps, other, mask), first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_its_denoiser_takes_any_method(kind: str) -> None:
    made = pipeline(kind)
    noise = torch.randn(1, 3, 16, 16)
    plain = made("a cat", num_inference_steps=2, latents=noise, output_type="pt").images
    tuning = mmpeft.attach(made.denoiser, mmpeft.LoRA(at="attn.*|cross.*", rank=2))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(std=0.5)
    assert not torch.allclose(made("a cat", num_inference_steps=2, latents=noise, output_type="pt").images, plain)
    tuning.detach()
    assert torch.equal(made("a cat", num_inference_steps=2, latents=noise, output_type="pt").images, plain)


@pytest.mark.parametrize("name", of_today(SHIPPED, lambda name: ("shipped",)))
def test_what_ships_draws_what_it_is_asked_for(name: str) -> None:
    """Names that it never saw, among nine categories."""
    made = create(f"embedded:{name}")
    known = emoji("noto", "test", made.size)
    rows = spread(known.labels, 32, 0)
    prompts = [captions(known)[row][0] for row in rows]
    images = made(prompts, num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert small_judge("noto").accuracy(images, prompts, known.labels[rows])["caption"] > 0.2


def test_bad_prompts_and_parts() -> None:
    with pytest.raises(DataError, match="longer than the encoder's 32"):
        pipeline("unet").encode_prompt(["word " * 50])
    with pytest.raises(ConfigError, match="either a unet or a transformer"):
        PixelPipeline(FlowMatchEulerDiscreteScheduler(), None, None)
