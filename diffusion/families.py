"""What differs between text-to-image pipelines in training; one small class for each way to be conditioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.diffusion.family import FACTS, Condition, Family
from mmpeft.errors import ConfigError
from mmpeft.types import Kwargs, Untyped

FAMILIES: dict[str, type[Family]] = {}


def _register(family: type[Family]) -> type[Family]:
    FAMILIES.update(dict.fromkeys(family.pipelines, family))
    return family


def family_of(pipeline: Untyped) -> Family:
    """The family of a pipeline.

    Raises:
        ConfigError: none is known for its class.
    """
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ConfigError(f"{name} cannot be tuned here; known pipelines: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name](pipeline)


@_register
class Pixel(Family):
    """This package's pipelines over pixels."""

    pipelines = ("PixelPipeline",)

    def sides(self, size: int) -> Kwargs:
        if size != self.pipeline.size:
            raise ConfigError(f"this pipeline draws {self.pipeline.size} pixels, asked for {size}")
        return {}

    @property
    def contexts(self) -> list[tuple[Untyped, int]]:
        return [(self.pipeline.tokenizer, int(self.pipeline.text_encoder.config.max_position_embeddings))]

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        text, mask = self.pipeline.encode_prompt(prompts)
        return {"text": text, "mask": mask}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        found: Tensor = self.pipeline.predict(noisy, timesteps, condition["text"], condition["mask"])
        return found


@_register
class StableDiffusion(Family):
    """Stable Diffusion 1 and 2: one text encoder, cross-attention."""

    pipelines = ("StableDiffusionPipeline",)

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        return {"text": self.pipeline.encode_prompt(list(prompts), self.pipeline.device, 1, False)[0]}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        found: Tensor = self.denoiser(noisy, timesteps, condition["text"], return_dict=False)[0]
        return found


@_register
class StableDiffusionXL(Family):
    """SDXL: two text encoders, pooled text, and the sizes of image and crop."""

    pipelines = ("StableDiffusionXLPipeline",)

    @property
    def contexts(self) -> list[tuple[Untyped, int]]:
        both = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return [(t, int(t.model_max_length)) for t in both if t is not None]

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        text, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # what guidance compares with when images are drawn
            said = torch.tensor([prompt != "" for prompt in prompts], device=text.device)
            text = torch.where(said[:, None, None], text, 0)
            pooled = torch.where(said[:, None], pooled, 0)
        return {"text": text, "pooled": pooled}

    def scaled(self, latents: Tensor) -> Tensor:
        """Also by mean and deviation of each channel where the autoencoder has them, as Playground 2.5's."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return super().scaled(latents)
        middle, width = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        found: Tensor = (latents - middle) * config.scaling_factor / width
        return found

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        whole = torch.tensor([noisy.shape[-2:]], device=noisy.device).expand(len(noisy), 2) * self.scale
        sizes = [condition.get(name, torch.zeros_like(whole) if name == "crop" else whole) for name in FACTS]
        added = {"text_embeds": condition["pooled"], "time_ids": torch.cat(sizes, 1).to(noisy)}
        text = condition["text"]
        found: Tensor = self.denoiser(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]
        return found


@_register
class StableDiffusion3(Family):
    """SD3 and 3.5: joint attention over image and text, pooled text."""

    pipelines = ("StableDiffusion3Pipeline",)

    @property
    def contexts(self) -> list[tuple[Untyped, int]]:
        """T5 reads it all; where it was left out, the two CLIP encoders do."""
        if self.pipeline.text_encoder_3 is not None:
            return [(self.pipeline.tokenizer_3, 256)]
        return [(t, int(t.model_max_length)) for t in (self.pipeline.tokenizer, self.pipeline.tokenizer_2)]

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        texts = list(prompts)
        text, _, pooled, _ = self.pipeline.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        found: Tensor = self.denoiser(
            noisy,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            timestep=timesteps,
            return_dict=False,
        )[0]
        return found


@_register
class Flux(Family):
    """Flux: patches of 2×2 latents as tokens, guidance as an input where it was distilled."""

    pipelines = ("FluxPipeline",)
    aliases: ClassVar[Mapping[str, str]] = {"text_encoder_3": "text_encoder_2"}
    guidance: ClassVar[float] = 3.5
    guided = False

    @property
    def contexts(self) -> list[tuple[Untyped, int]]:
        return [(self.pipeline.tokenizer_2, 512)]

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        text, pooled, _ = self.pipeline.encode_prompt(list(prompts), None)
        return {"text": text, "pooled": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        count, channels, height, width = noisy.shape
        rows, columns, text = height // 2, width // 2, condition["text"]
        packed = self.pipeline._pack_latents(noisy, count, channels, height, width)
        places = self.pipeline._prepare_latent_image_ids(count, rows, columns, noisy.device, noisy.dtype)
        guided = self.denoiser.config.guidance_embeds
        tokens: Tensor = self.denoiser(
            hidden_states=packed,
            timestep=timesteps / 1000,
            guidance=torch.full_like(timesteps, self.guidance, dtype=noisy.dtype) if guided else None,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=places,
            return_dict=False,
        )[0]
        patches = tokens.view(count, rows, columns, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, height, width)


@_register
class PixArt(Family):
    """PixArt-α and -Σ: T5 with a mask; the second half of the channels, a learned variance, is left as it is."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    @property
    def contexts(self) -> list[tuple[Untyped, int]]:
        return [(self.pipeline.tokenizer, 120 if type(self.pipeline).__name__ == "PixArtAlphaPipeline" else 300)]

    def sides(self, size: int) -> Kwargs:
        own = {"use_resolution_binning": False, "clean_caption": False}  # prompts are drawn as they were trained
        return {"height": size, "width": size, **own}

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        found = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"text": found[0], "mask": found[1]}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.use_additional_conditions:
            sides = torch.tensor([noisy.shape[-2:]], device=noisy.device, dtype=noisy.dtype).expand(len(noisy), 2)
            sizes = {"resolution": sides * self.scale, "aspect_ratio": sides[:, :1] / sides[:, 1:]}
        found: Tensor = self.denoiser(
            noisy,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
            timestep=timesteps,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return found[:, : noisy.shape[1]]
