"""Concept sliders: an adapter whose strength turns one property of what is drawn up or down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.data.sampling import hash_seed
from mmpeft.diffusion.style.task import StyleTuner
from mmpeft.errors import ConfigError
from mmpeft.types import Argument, Fields


class SliderTuner(StyleTuner):
    """Teaches a text-to-image pipeline a property that is turned up and down: smiling, age, light.

    `f(x_t, t, c) ← f₀(x_t, t, c) + η mean_p (f₀(x_t, t, c⁺ p) − f₀(x_t, t, c⁻ p))`, f₀ with the tuning off.

    The images only say where on the way from noise the concept is taught; no pairs of images are needed. Afterwards
    `mmpeft sample --strength` turns the property: up above 0, down below.
    Paper: https://arxiv.org/abs/2311.12092
    """

    def __init__(
        self,
        pipeline: str,
        concept: str = "",
        more: str = "",
        less: str = "",
        keep: Sequence[str] = ("",),
        scale: float = 1.0,
        **options: Argument,
    ) -> None:
        """
        Args:
            pipeline: a hub repository, a folder of diffusers' layout, or `embedded:unet_emoji`.
            concept: c, what the slider is for: `a face`.
            more: c⁺, with more of the property: `a smiling face`.
            less: c⁻, with less of it: `a sad face`.
            keep: p, words added to both, whose own meaning the slider should leave alone.
            scale: η.
            options: those of `StyleTuner`.

        Raises:
            ConfigError: a prompt is missing, or both are the same.
        """
        super().__init__(pipeline, **options)
        if not (concept and more and less) or more == less:
            raise ConfigError(f"a slider wants concept, more and less, got {concept!r}, {more!r} and {less!r}")
        if not keep:
            raise ConfigError("keep has one entry at least, which may be empty")
        self.concept, self.scale = concept, scale
        self.ends = [(_joined(more, own), _joined(less, own)) for own in keep]

    def own_prompts(self) -> list[str]:
        return [*super().own_prompts(), self.concept, *(prompt for pair in self.ends for prompt in pair)]

    def loss(self, batch: Fields, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.current_epoch, index, self.global_rank))
        latents = self.latents(batch)
        noise, steps = self._draw(latents, generator)

        def predicted(prompt: str) -> Tensor:
            return self._predict(latents, noise, steps, self.condition([prompt] * len(latents), batch)).float()

        with torch.no_grad(), self._base():
            way = torch.stack([predicted(more) - predicted(less) for more, less in self.ends]).mean(0)
            goal = predicted(self.concept) + self.scale * way
        loss = (predicted(self.concept) - goal).square().mean()
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(latents))
        return loss


def _joined(prompt: str, words: str) -> str:
    return f"{prompt}, {words}" if words else prompt
