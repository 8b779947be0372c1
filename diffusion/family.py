"""A text-to-image pipeline as a training loop sees it: encode a prompt, encode an image, predict, draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from mmpeft.data.captioned import listed
from mmpeft.errors import ConfigError, DataError
from mmpeft.types import AnyModule, Kwargs, Untyped

Condition = dict[str, Tensor]
"""What a denoiser is told beside noise and time, batch first: text features, and the sizes SDXL asks for."""

FACTS = ("original_size", "crop", "target_size")
"""Height and width of the image before it was resized, top and left of the crop, height and width of the crop."""


class Family(ABC):
    """A pipeline seen by a training loop: encode a prompt, encode an image, predict.

    Shapes: images [B, 3, H, W] in [−1, 1], latents [B, c, h, w], timesteps [B] as `Objective` draws them.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """diffusers' classes of this family."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """What files call encoders otherwise than the pipeline does."""
    guided: ClassVar[bool] = True
    """Whether guidance compares two predictions; else it is an input of one."""

    def __init__(self, pipeline: Untyped) -> None:
        self.pipeline = pipeline

    @property
    def part(self) -> str:
        """Name of the denoiser among the pipeline's components."""
        return "transformer" if getattr(self.pipeline, "transformer", None) is not None else "unet"

    @property
    def denoiser(self) -> AnyModule:
        """The UNet or transformer."""
        return getattr(self.pipeline, self.part)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by component name."""
        known = self.pipeline.components.items()
        return {name: part for name, part in known if name.startswith("text_encoder") and part is not None}

    @property
    def places(self) -> list[str]:
        """Component names of text encoders, those that the pipeline was opened without included."""
        return [name for name in self.pipeline.components if name.startswith("text_encoder")]

    @property
    def vae(self) -> AnyModule:
        """The autoencoder; None where the denoiser works on pixels."""
        return getattr(self.pipeline, "vae", None)

    @property
    def scale(self) -> int:
        """Pixels a latent."""
        return int(getattr(self.pipeline, "vae_scale_factor", 1)) if self.vae is not None else 1

    @property
    def size(self) -> int:
        """Height and width in pixels that the pipeline was made for."""
        side = getattr(self.denoiser.config, "sample_size", None) or self.pipeline.default_sample_size
        return int(side) * self.scale

    @property
    def multiple(self) -> int:
        """What heights and widths must be multiples of, in pixels."""
        if self.part == "unet":
            return int(self.scale * 2 ** (len(self.denoiser.config.down_block_types) - 1))
        patch = getattr(self.denoiser.config, "patch_size", 1)
        return int(self.scale * max(patch, 2 if self.scale > 1 else 1))

    @property
    def contexts(self) -> list[tuple[Untyped, int]]:
        """Tokenizers whose text a prompt must fit, with the tokens they may give."""
        return [(self.pipeline.tokenizer, int(self.pipeline.tokenizer.model_max_length))]

    def check_prompts(self, prompts: Sequence[str], where: Callable[[str], str] | None = None) -> None:
        """Raise DataError if prompts are longer than an encoder reads: what was cut off would be missing silently.

        `where` is what the error calls a prompt; None for its beginning.
        """
        known = self.pipeline
        spelled = getattr(known, "maybe_convert_prompt", lambda texts, tokenizer: texts)  # words of many vectors
        for tokenizer, limit in self.contexts if prompts else ():
            with quiet():
                rows = tokenizer(spelled(list(prompts), tokenizer), truncation=False)["input_ids"]
            long = [
                f"{(where or beginning)(prompt)} ({len(ids)})" for prompt, ids in zip(prompts, rows) if len(ids) > limit
            ]
            if long:
                raise DataError(
                    f"{len(long)} prompt{'s are' if len(long) > 1 else ' is'} longer than the {limit} tokens the text "
                    f"encoder reads: {listed(long)}; shorten what is said"
                )

    @abstractmethod
    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        """Text features of prompts."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Latents: the mean of the autoencoder's distribution, shifted and scaled; the pixels where there is none."""
        vae = self.vae
        if vae is None:
            return images
        before = vae.dtype
        upcast = before == torch.float16 and getattr(vae.config, "force_upcast", False)
        if upcast:
            vae.to(torch.float32)
        mean: Tensor = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        if upcast:
            vae.to(before)
        return self.scaled(mean)

    def scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as the denoiser takes them: what the pipeline undoes before it decodes."""
        config = self.vae.config
        found: Tensor = (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
        return found

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """What the denoiser makes of noisy latents, [B, c, h, w]."""

    def draw(
        self,
        prompts: Sequence[str],
        generators: list[torch.Generator],
        steps: int,
        guidance: float,
        size: int,
        negative: str = "",
    ) -> Tensor:
        """Images [B, 3, size, size] in [0, 1] by the pipeline itself, one noise a prompt; guided away from `negative`.

        Raises:
            ConfigError: a negative prompt where guidance does not compare two predictions.
        """
        options: Kwargs = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        if negative:
            if not self.guided or guidance <= 1:
                raise ConfigError(
                    f"a negative prompt needs guidance between two predictions; {type(self.pipeline).__name__} at "
                    f"guidance {guidance} makes one"
                )
            options["negative_prompt"] = [negative] * len(prompts)
        found: Tensor = self.pipeline(list(prompts), generator=generators, **self.sides(size), **options).images
        return found

    def sides(self, size: int) -> Kwargs:
        """The pipeline's arguments for height and width."""
        return {"height": size, "width": size}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of transformers: a tokenizer's own about length comes before the error that says more."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def beginning(text: str, longest: int = 60) -> str:
    """A text in quotes, no longer than that."""
    return repr(text if len(text) <= longest else f"{text[:longest]}…")
