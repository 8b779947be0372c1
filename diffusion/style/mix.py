"""`mmpeft mix`: several LoRAs of a pipeline in one file, as a weighted sum or by ZipLoRA."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Generator, Tensor

from mmpeft.combine.zip import penalty, zip_lora
from mmpeft.data.sampling import hash_seed
from mmpeft.diffusion.backbone import create
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.family import Condition, Family
from mmpeft.diffusion.objective import Objective, objective_of
from mmpeft.diffusion.style.command import base_of, open_adapters
from mmpeft.errors import ConfigError
from mmpeft.formats.exchange import Exported, export, mix_files, needs_model
from mmpeft.surgery.choice import use
from mmpeft.tuning import Tuning

STEPS = 20
GUIDANCE = 3.0


def run(options: argparse.Namespace) -> int:
    """Write several LoRAs of a pipeline as one."""
    weights = options.weights if options.weights is not None else [1.0] * len(options.adapter)
    if len(options.adapter) < 2 or len(weights) != len(options.adapter):
        raise ConfigError(f"expected two adapters and a weight each, got {len(options.adapter)} and {len(weights)}")
    if options.prompt and len(options.prompt) != len(options.adapter):
        raise ConfigError(f"expected a prompt for each of {len(options.adapter)} adapters, got {len(options.prompt)}")
    if not options.prompt and not options.pipeline and not any(map(needs_model, options.adapter)):
        return _say(mix_files(options.adapter, options.out, options.to, weights=weights))
    family = family_of(create(base_of(options.pipeline, options.adapter).pipeline))
    opened = open_adapters(family, options.adapter)
    if any(tuning.model is not family.denoiser for own in opened for tuning in own):
        raise ConfigError("an adapter tunes the text encoders as well; mixed are those of the denoiser alone")
    family.check_prompts(options.prompt)
    family.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    tunings = [own[0] for own in opened]
    zipped = zip_lora(tunings, weights)
    if options.prompt:
        makers = [DrawnAdapter.of(family, t, p, options.images, options.seed) for t, p in zip(tunings, options.prompt)]
        first, last = fit(family, makers, zipped, options.steps, options.lr, options.penalty, options.seed)
        print(f"distance from each adapter's own answers: {first:.2e} as a sum, {last:.2e} after {options.steps} steps")
    return _say(export(zipped, options.out, options.to, prefix=family.part))


def _say(written: Exported) -> int:
    by = " and ".join(written.verified_by) or "nobody"
    Console().print(f"{written.path}: {written.layers} layers, {written.bytes:,} bytes; read back by {by}")
    return 0


@dataclass(frozen=True)
class DrawnAdapter:
    """An adapter with images that it drew for its prompt: the answers that the mixture should keep."""

    tuning: Tuning
    latents: Tensor
    condition: Condition

    @classmethod
    @torch.no_grad()
    def of(cls, family: Family, tuning: Tuning, prompt: str, count: int, seed: int) -> DrawnAdapter:
        noise = [torch.Generator().manual_seed(hash_seed(seed, i)) for i in range(count)]
        with use(tuning.model, tuning.name):
            images = family.draw([prompt] * count, noise, STEPS, GUIDANCE, family.size)
        latents = family.encode_image(images.to(family.denoiser.dtype) * 2 - 1)
        return cls(tuning, latents, family.encode_prompt([prompt] * count))

    def error(self, family: Family, objective: Objective, zipped: Tuning, generator: Generator) -> Tensor:
        """`mean ‖f_zip(x_t, t, c) − f_k(x_t, t, c)‖²` over this adapter's images."""
        model = self.tuning.model
        steps = objective.draw(len(self.latents), generator).to(self.latents.device)
        noise = torch.randn(self.latents.shape, generator=generator).to(self.latents)
        noisy = objective.noisy(self.latents, noise, steps).to(self.latents.dtype)
        with torch.no_grad(), use(model, self.tuning.name):
            wanted = family.predict(noisy, steps, self.condition)
        with use(model, zipped.name):
            found = family.predict(noisy, steps, self.condition)
        return (found - wanted).float().square().mean()


def fit(
    family: Family, makers: Sequence[DrawnAdapter], zipped: Tuning, steps: int, lr: float, weight: float, seed: int = 0
) -> tuple[float, float]:
    """Train the column weights by Adam; the distance from the adapters' answers before and after, at the same noise."""
    objective = objective_of(family.pipeline.scheduler)
    optimizer = torch.optim.Adam(list(zipped.parameters()), lr)

    def distance(generator: Generator) -> Tensor:
        return torch.stack([m.error(family, objective, zipped, generator) for m in makers]).sum()

    def measured() -> float:
        with torch.no_grad():
            return float(distance(torch.Generator().manual_seed(hash_seed(seed, 10_000))))

    first = measured()
    for step in track(range(steps), "ZipLoRA", transient=True, disable=steps < 10):
        optimizer.zero_grad()
        loss = distance(torch.Generator().manual_seed(hash_seed(seed, 20_000 + step))) + weight * penalty(zipped)
        loss.backward()
        optimizer.step()
    return first, measured()
