"""A text-to-image pipeline without an autoencoder: the denoiser works on pixels. For small images, such as emoji."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from mmpeft.errors import ConfigError, DataError
from mmpeft.types import AnyModule, Kwargs, Output


class PixelPipeline(DiffusionPipeline, TextualInversionLoaderMixin):  # type: ignore[misc]  # diffusers is not followed
    """Text to image by a UNet or a DiT over RGB, `PixelPipeline.from_pretrained(folder)`.

    Components: `unet` (UNet2DConditionModel) or `transformer` (PixArtTransformer2DModel), the other one None; a flow
    matching `scheduler`; `text_encoder` (transformers' CLIPTextModel) and its `tokenizer`.
    """

    model_cpu_offload_seq = "text_encoder->unet->transformer"
    _optional_components = ["unet", "transformer"]  # noqa: RUF012 - diffusers adds to it

    def __init__(
        self, scheduler: Any, text_encoder: Any, tokenizer: Any, unet: Any = None, transformer: Any = None
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ConfigError("PixelPipeline takes either a unet or a transformer")
        self.register_modules(
            scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, transformer=transformer
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @property
    def denoiser(self) -> AnyModule:
        """The model that is trained: the UNet or the transformer."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return int(self.denoiser.config.sample_size)

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features [B, n, d] of prompts and which of their tokens are no padding, [B, n].

        Raises:
            DataError: a prompt is longer than the encoder's context.
        """
        limit = self.text_encoder.config.max_position_embeddings
        prompts = self.maybe_convert_prompt(list(prompts), self.tokenizer)
        for prompt, ids in zip(prompts, self.tokenizer(prompts)["input_ids"]):
            if len(ids) > limit:
                raise DataError(f"a prompt of {len(ids)} tokens is longer than the encoder's {limit}: {prompt!r}")
        found = self.tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt")
        ids, mask = found["input_ids"].to(self.device), found["attention_mask"].to(self.device)
        return self.text_encoder(ids).last_hidden_state, mask

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """What the denoiser makes of noisy images [B, 3, S, S] at timesteps [B]."""
        options: Kwargs = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "return_dict": False}
        if self.unet is not None:
            found: Tensor = self.unet(noisy, timesteps, **options)[0]
        else:
            found = self.transformer(noisy, timestep=timesteps, added_cond_kwargs={}, **options)[0]
        return found

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        generator: Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Output:
        """Draw one image a prompt.

        Args:
            prompt: one text or several.
            negative_prompt: what guidance leads away from, one text or one a prompt.
            num_inference_steps: denoising steps.
            guidance_scale: 1 for none.
            generator: of the starting noise.
            latents: starting noise [B, 3, S, S] in place of drawn noise.
            output_type: `pil`, `np`, `pt` (in [0, 1]) or `latent` (in [−1, 1]).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        guided = guidance_scale != 1
        away = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        text, mask = self.encode_prompt([*prompts, *(away if guided else [])])
        shape = (len(prompts), 3, self.size, self.size)
        x = latents if latents is not None else randn_tensor(shape, generator, self.device, text.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for step in self.progress_bar(self.scheduler.timesteps):
            both = torch.cat([x, x]) if guided else x
            found = self.predict(both, step.expand(len(both)), text, mask)
            if guided:
                wanted, unwanted = found.chunk(2)
                found = unwanted + guidance_scale * (wanted - unwanted)
            x = self.scheduler.step(found, step, x, return_dict=False)[0]
        images = x if output_type == "latent" else self.image_processor.postprocess(x, output_type=output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)
