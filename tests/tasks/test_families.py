"""Every family of pipelines predicts in training what its pipeline predicts while it draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmpeft.diffusion import backbone
from mmpeft.diffusion.families import FAMILIES, family_of
from mmpeft.errors import ConfigError, DataError
from tests.tasks.tiny_pipelines import PIPELINES, pipeline

PROMPTS = ["a cat", "red apple"]


@pytest.mark.parametrize("kind", PIPELINES)
def test_training_sees_the_denoiser_as_drawing_does(kind: str) -> None:
    made = pipeline(kind)
    family = family_of(made)
    seen: list[tuple[Any, Any, Any]] = []
    handle = family.denoiser.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output[0])), with_kwargs=True
    )
    channels = 3 if family.vae is None else 4
    side = family.size // family.scale if kind != "flux" else 8
    noise = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    given = made._pack_latents(noise, 2, channels, side, side) if kind == "flux" else noise
    options: dict[str, Any] = {"height": side * family.scale, "width": side * family.scale}
    options |= {"max_sequence_length": 32} if kind in ("flux", "pixart") else {}
    options |= {"use_resolution_binning": False} if kind == "pixart" else {}
    options = {} if kind.startswith("pixel") else options
    guidance = 3.5 if kind == "flux" else 1.0
    made(PROMPTS, num_inference_steps=1, guidance_scale=guidance, latents=given, output_type="latent", **options)
    handle.remove()
    args, kwargs, drawn = seen[0]
    step = kwargs.get("timestep", args[1] if len(args) > 1 else None) * (1000 if kind == "flux" else 1)
    with torch.no_grad():
        condition = family.encode_prompt(PROMPTS)
        if kind in ("flux", "pixart"):  # a shorter sequence than the one prompts are padded to by default
            condition["text"] = kwargs["encoder_hidden_states"]
        if kind == "pixart":
            condition["mask"] = kwargs["encoder_attention_mask"]
        found = family.predict(noise, step.expand(2), condition)
    if kind == "flux":
        found = made._pack_latents(found, 2, channels, side, side)
    torch.testing.assert_close(found, drawn[:, : found.shape[1]] if kind == "pixart" else drawn, atol=1e-5, rtol=1e-5)


def test_no_caption_is_what_guidance_compares_with() -> None:
    """SDXL draws without a negative prompt from zeros, not from an empty text."""
    made = pipeline("sdxl")
    seen: list[Any] = []
    handle = made.unet.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True
    )
    made("a cat", num_inference_steps=1, guidance_scale=3.0, height=16, width=16, output_type="latent")
    handle.remove()
    (_, kwargs) = seen[0]
    condition = family_of(made).encode_prompt(["", "a cat"])
    torch.testing.assert_close(condition["text"], kwargs["encoder_hidden_states"])
    torch.testing.assert_close(condition["pooled"], kwargs["added_cond_kwargs"]["text_embeds"])
    assert not condition["text"][0].any()
    made.register_to_config(force_zeros_for_empty_prompt=False)
    assert family_of(made).encode_prompt([""])["text"].any()


def test_latents_by_mean_and_deviation_of_each_channel() -> None:
    """As Playground 2.5's autoencoder has them; the pipeline undoes them before it decodes."""
    made = pipeline("sdxl")
    made.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[2.0, 3.0, 4.0, 5.0])
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = family_of(made).encode_image(images)
    seen: list[torch.Tensor] = []
    real = made.vae.decode
    made.vae.decode = lambda latents, **options: seen.append(latents) or real(latents, **options)
    made.scheduler.step = lambda *args, **options: (latents,)
    made("a cat", num_inference_steps=1, guidance_scale=1.0, height=16, width=16, output_type="np")
    torch.testing.assert_close(seen[0], made.vae.encode(images).latent_dist.mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
def test_latents_come_back_as_the_image_they_decode_to(kind: str) -> None:
    family = family_of(pipeline(kind))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = family.encode_image(images)
    config = family.vae.config
    decoded = family.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
    expected = family.vae.decode(family.vae.encode(images).latent_dist.mean).sample
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_sizes() -> None:
    found = {
        kind: (family_of(pipeline(kind)).size, family_of(pipeline(kind)).multiple) for kind in ("pixel-unet", "sd")
    }
    assert found == {"pixel-unet": (16, 2), "sd": (16, 4)}
    assert family_of(pipeline("pixel-dit")).multiple == 4
    assert family_of(pipeline("sd3")).multiple == 4


def test_what_xl_is_told_of_sizes_matters() -> None:
    family = family_of(pipeline("sdxl"))
    noise, steps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    condition = family.encode_prompt(["a cat"])
    plain = family.predict(noise, steps, condition)
    told = {**condition, "original_size": torch.tensor([[16, 16]]), "crop": torch.tensor([[0, 0]])}
    torch.testing.assert_close(family.predict(noise, steps, told), plain)
    told["crop"] = torch.tensor([[8, 0]])
    assert not torch.allclose(family.predict(noise, steps, told), plain)


@pytest.mark.parametrize("kind", ["pixel-unet", "sd", "sdxl"])
def test_a_caption_longer_than_the_encoder(kind: str) -> None:
    with pytest.raises(DataError, match="the 32 tokens the text encoder reads"):
        family_of(pipeline(kind)).check_prompts(["short", "red apple " * 40])


def test_names(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="known pipelines: Flux"):
        family_of(object())
    with pytest.raises(ConfigError, match="no embedded pipeline 'unet_emojj'"):
        backbone.create("embedded:unet_emojj")
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        backbone.create(str(tmp_path))
    with pytest.raises(ConfigError, match="there is no folder"):
        backbone.create("./nowhere")
    assert len(FAMILIES) == 7


@pytest.mark.parametrize("kind", ["pixel-unet", "sd"])
def test_a_folder_is_read_back(kind: str, tmp_path: Any) -> None:
    made = pipeline(kind).to(torch.float16)
    made.save_pretrained(tmp_path)
    again = backbone.create(str(tmp_path))
    assert type(again) is type(made)
    family, other = family_of(made), family_of(again)
    for part in (other.denoiser, *other.encoders.values(), *([other.vae] if other.vae else [])):
        assert {tensor.dtype for tensor in part.parameters()} == {torch.float32}
    for name, tensor in family.denoiser.state_dict().items():
        torch.testing.assert_close(other.denoiser.state_dict()[name], tensor.float())
    assert not any(p.requires_grad for p in other.denoiser.parameters())
