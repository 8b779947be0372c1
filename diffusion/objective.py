"""What a diffusion model learns: which timesteps are drawn, how noise is added, what is predicted, how losses weigh."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Generator, Tensor

from mmpeft.errors import ConfigError
from mmpeft.types import Untyped

Prediction = Literal["epsilon", "v_prediction", "sample"]
Sampling = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class TimestepSampling:
    """How noisy training samples are, as a share σ of the way from image to noise.

    `uniform`, or `logit_normal`: `σ = sigmoid(mean + std z)`, most often half-way (arXiv:2403.03206). Then
    `σ ← k σ / (1 + (k − 1) σ)` with `shift` k > 1 towards noise, as larger images want it: diffusers' `shift` of
    flow matching, `discrete_flow_shift` of other trainers.
    """

    sampling: Sampling = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.std <= 0:
            raise ConfigError(f"shift and std of the noise levels must be positive, got {self.shift} and {self.std}")
        if self.sampling not in ("uniform", "logit_normal"):
            raise ConfigError(f"noise levels are drawn `uniform` or `logit_normal`, got {self.sampling!r}")

    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        """σ in [0, 1), [count]."""
        if self.sampling == "uniform":
            sigma = torch.rand(count, generator=generator)
        else:
            sigma = (self.mean + self.std * torch.randn(count, generator=generator)).sigmoid()
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


Levels = TimestepSampling
"""Deprecated name of `TimestepSampling`."""


class Objective(ABC):
    """Draws timesteps, makes a noisy sample of each latent, and weighs the squared error of the prediction.

    Shapes: latents, noise and predictions [B, ...]; timesteps [B].
    """

    timesteps: TimestepSampling

    @abstractmethod
    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        """Timesteps as the model takes them, [B]."""

    @abstractmethod
    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The model's input."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict."""

    def weights(self, timesteps: Tensor) -> Tensor:
        """Weight of each sample's error, [B]."""
        return torch.ones_like(timesteps, dtype=torch.float32)

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`mean_b w_b · mean (prediction − target)²`, in fp32."""
        error = (prediction.float() - self.target(latents, noise, timesteps).float()).square().flatten(1).mean(1)
        return (self.weights(timesteps) * error).mean()


class Denoising(Objective):
    """`x_t = √ᾱ x₀ + √(1 − ᾱ) ε`; the model predicts ε, x₀ or `v = √ᾱ ε − √(1 − ᾱ) x₀`.

    With `snr_gamma` γ the errors are those of x₀ clipped at γ, "min-SNR" (arXiv:2303.09556):
    `min(SNR, γ) / SNR` for ε, `min(SNR, γ) / (SNR + 1)` for v and `min(SNR, γ)` for x₀, `SNR = ᾱ / (1 − ᾱ)`.
    """

    def __init__(
        self, scheduler: Untyped, snr_gamma: float | None = None, timesteps: TimestepSampling | None = None
    ) -> None:
        """
        Args:
            scheduler: diffusers' DDPM or DDIM scheduler of the pipeline, which says what is predicted.
            snr_gamma: γ, usually 5; None for equal weights.
            timesteps: which are drawn; None for all alike.
        """
        self.scheduler, self.snr_gamma, self.timesteps = scheduler, snr_gamma, timesteps or TimestepSampling()
        self.prediction: Prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(f"the scheduler predicts {self.prediction!r}; expected epsilon, v_prediction or sample")
        if snr_gamma is not None and not snr_gamma > 0:
            raise ConfigError(f"snr_gamma must be positive, got {snr_gamma}; leave it out for equal weights")

    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        drawn: Tensor = self.timesteps.draw(count, generator) * self.scheduler.config.num_train_timesteps
        return drawn.long()

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        found: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return found

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction == "v_prediction":
            found: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return found
        return noise if self.prediction == "epsilon" else latents

    def weights(self, timesteps: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return super().weights(timesteps)
        snr: Tensor = compute_snr(self.scheduler, timesteps).float()
        clipped: Tensor = snr.clamp(max=self.snr_gamma)
        if self.prediction == "epsilon":
            return torch.where(snr > 0, clipped / snr.clamp(min=1e-8), torch.ones_like(snr))  # no signal: 0 / 0 → 1
        return clipped / (snr + 1) if self.prediction == "v_prediction" else clipped


class FlowMatching(Objective):
    """`x_σ = (1 − σ) x₀ + σ ε`; the model predicts `ε − x₀` (arXiv:2210.02747) and is told `σ · 1000`."""

    steps = 1000

    def __init__(self, timesteps: TimestepSampling | None = None) -> None:
        self.timesteps = timesteps or TimestepSampling("logit_normal")

    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        return self.timesteps.draw(count, generator) * self.steps

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = (timesteps / self.steps).reshape(-1, *[1] * (latents.dim() - 1)).to(latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents


class EDM(Objective):
    """`x_σ = (x₀ + σ ε) / √(σ² + σ_d²)`; the model predicts F of `x₀ = c_skip (x₀ + σ ε) + c_out F` (arXiv:2206.00364).

    `c_skip = σ_d² / (σ² + σ_d²)`, `c_out = ±σ σ_d / √(σ² + σ_d²)`, + where the scheduler calls the prediction ε. The
    model is told `ln(σ) / 4`. The paper's weights are those under which every σ's error of F counts alike.
    """

    def __init__(self, scheduler: Untyped, timesteps: TimestepSampling | None = None) -> None:
        """
        Args:
            scheduler: diffusers' EDM scheduler of the pipeline.
            levels: which of its noise levels are drawn, from the least (0) to the greatest (1); None for all alike.
        """
        facts = scheduler.config
        self.timesteps, self.data = timesteps or TimestepSampling(), float(facts.sigma_data)
        self.least, self.most, self.rho = float(facts.sigma_min), float(facts.sigma_max), float(facts.rho)
        self.exponential = facts.sigma_schedule == "exponential"
        self.sign = -1.0 if facts.prediction_type == "v_prediction" else 1.0

    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        share = self.timesteps.draw(count, generator)
        if self.exponential:
            return (math.log(self.least) + share * (math.log(self.most) - math.log(self.least))) / 4
        low, high = self.least ** (1 / self.rho), self.most ** (1 / self.rho)
        levels: Tensor = (low + share * (high - low)).log() * self.rho / 4
        return levels

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self._sigma(timesteps, latents)
        return (latents + sigma * noise) / (sigma**2 + self.data**2).sqrt()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self._sigma(timesteps, latents)
        square = sigma**2 + self.data**2
        skipped = self.data**2 / square * (latents + sigma * noise)
        return (latents - skipped) * square.sqrt() / (self.sign * sigma * self.data)

    def _sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return (timesteps.float() * 4).exp().reshape(-1, *[1] * (like.dim() - 1)).to(like)


def objective_of(
    scheduler: Untyped, snr_gamma: float | None = None, timesteps: TimestepSampling | None = None
) -> Objective:
    """What a pipeline's denoiser was trained for, by the pipeline's scheduler.

    Flow matching draws logit-normal levels with the scheduler's own shift unless told otherwise.

    Raises:
        ConfigError: `snr_gamma` for flow matching or EDM, whose levels are what is weighted, or a scheduler of which
            it is not known what its model was trained for.
    """
    facts, name = scheduler.config, type(scheduler).__name__
    edm = name.startswith("EDM")
    if not edm and "FlowMatch" not in name:
        if "beta_start" not in facts or facts.get("timestep_type", "discrete") != "discrete":
            raise ConfigError(
                f"it is not known what a model under a {name} was trained for; expected a scheduler of discrete steps "
                "by betas (DDPM, DDIM, Euler, …), of flow matching, or of EDM"
            )
        return Denoising(DDPMScheduler.from_config(facts), snr_gamma, timesteps)
    if snr_gamma is not None:
        raise ConfigError(
            "snr_gamma weighs the errors of ε, v and x₀ models; for flow matching and EDM set `timestep_sampling` "
            "instead"
        )
    if edm:
        return EDM(scheduler, timesteps)
    moving = facts.get("use_dynamic_shifting", False)
    return FlowMatching(timesteps or TimestepSampling("logit_normal", shift=1.0 if moving else facts.get("shift", 1.0)))
