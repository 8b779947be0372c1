"""What a diffusion model learns: which timesteps are drawn, how noise is added, what is predicted, how losses weigh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from diffusers.training_utils import compute_snr
from torch import Generator, Tensor

from mmpeft.errors import ConfigError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Sampling = Literal["uniform", "logit_normal"]


class Objective(ABC):
    """Draws timesteps, makes a noisy sample of each latent, and weighs the squared error of the prediction.

    Shapes: latents, noise and predictions [B, ...]; timesteps [B].
    """

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

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        """Args:
        scheduler: diffusers' DDPM or DDIM scheduler of the pipeline, which says what is predicted.
        snr_gamma: γ, usually 5; None for equal weights.
        """
        self.scheduler, self.snr_gamma = scheduler, snr_gamma
        self.prediction: Prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(f"the scheduler predicts {self.prediction!r}; expected epsilon, v_prediction or sample")
        if snr_gamma is not None and not snr_gamma > 0:
            raise ConfigError(f"snr_gamma must be positive, got {snr_gamma}; leave it out for equal weights")

    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        return torch.randint(self.scheduler.config.num_train_timesteps, (count,), generator=generator)

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
        snr = compute_snr(self.scheduler, timesteps).float()
        clipped = snr.clamp(max=self.snr_gamma)
        if self.prediction == "epsilon":
            return torch.where(snr > 0, clipped / snr.clamp(min=1e-8), torch.ones_like(snr))  # no signal: 0 / 0 → 1
        return clipped / (snr + 1) if self.prediction == "v_prediction" else clipped


class FlowMatching(Objective):
    """`x_σ = (1 − σ) x₀ + σ ε`; the model predicts `ε − x₀` (arXiv:2210.02747, 2403.03206) and is told `σ · 1000`.

    σ is uniform, or logit-normal (`σ = sigmoid(m + s z)`), and then shifted towards noise, as for larger images:
    `σ ← k σ / (1 + (k − 1) σ)`.
    """

    steps = 1000

    def __init__(
        self, sampling: Sampling = "logit_normal", mean: float = 0.0, std: float = 1.0, shift: float = 1.0
    ) -> None:
        if shift <= 0 or std <= 0:
            raise ConfigError(f"shift and std of the noise levels must be positive, got {shift} and {std}")
        if sampling not in ("uniform", "logit_normal"):
            raise ConfigError(f"noise levels are drawn `uniform` or `logit_normal`, got {sampling!r}")
        self.sampling, self.mean, self.std, self.shift = sampling, mean, std, shift

    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        if self.sampling == "uniform":
            sigma = torch.rand(count, generator=generator)
        else:
            sigma = (self.mean + self.std * torch.randn(count, generator=generator)).sigmoid()
        return self.shift * sigma / (1 + (self.shift - 1) * sigma) * self.steps

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = (timesteps / self.steps).reshape(-1, *[1] * (latents.dim() - 1)).to(latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents
