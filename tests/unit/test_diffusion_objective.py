"""Noise, targets and weights of diffusion training, against closed forms and diffusers' own samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from mmpeft.diffusion.objective import EDM, Denoising, FlowMatching, TimestepSampling, objective_of
from mmpeft.errors import ConfigError

LATENTS, NOISE = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
STEPS = torch.tensor([0, 10, 500, 999])


def alpha(scheduler: Any) -> torch.Tensor:
    return scheduler.alphas_cumprod[STEPS].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_costs_nothing_and_gives_the_image_back(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    objective = Denoising(scheduler)
    noisy, target = objective.noisy(LATENTS, NOISE, STEPS), objective.target(LATENTS, NOISE, STEPS)
    a = alpha(scheduler)
    torch.testing.assert_close(noisy, a.sqrt() * LATENTS + (1 - a).sqrt() * NOISE)
    assert float(objective.loss(target, LATENTS, NOISE, STEPS)) == 0
    for i, t in enumerate(STEPS[1:3].tolist(), 1):
        scheduler.set_timesteps(1000)
        back = scheduler.step(target[i : i + 1], t, noisy[i : i + 1]).pred_original_sample
        torch.testing.assert_close(back, LATENTS[i : i + 1], atol=1e-3, rtol=1e-3)


def test_min_snr_weighs_every_prediction_as_the_same_error_of_the_image() -> None:
    snr = {}
    for prediction in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=prediction)
        a = scheduler.alphas_cumprod[STEPS]
        snr = a / (1 - a)
        expected = {"epsilon": snr.clamp(max=5) / snr, "v_prediction": snr.clamp(max=5) / (snr + 1)}
        weights = Denoising(scheduler, snr_gamma=5.0).weights(STEPS)
        torch.testing.assert_close(weights, expected.get(prediction, snr.clamp(max=5)), rtol=1e-4, atol=1e-6)
    assert (Denoising(DDPMScheduler()).weights(STEPS) == 1).all()


def test_no_signal_gives_no_infinite_weight() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon")
    assert torch.isfinite(Denoising(scheduler, snr_gamma=5.0).weights(STEPS)).all()


def test_flow_matching_is_what_the_euler_sampler_integrates() -> None:
    objective, scheduler = FlowMatching(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    x = NOISE.clone()
    velocity = objective.target(LATENTS, NOISE, STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity, t, x).prev_sample
    torch.testing.assert_close(x, LATENTS, atol=1e-5, rtol=1e-4)
    steps = torch.full((4,), 250.0)
    torch.testing.assert_close(objective.noisy(LATENTS, NOISE, steps), 0.75 * LATENTS + 0.25 * NOISE)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_noise_levels_are_drawn_as_said(sampling: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = FlowMatching(TimestepSampling(sampling)).draw(20_000, generator) / 1000
    assert float(plain.min()) > 0
    assert float(plain.max()) < 1
    assert float(plain.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(plain.std()) == pytest.approx({"uniform": 0.289, "logit_normal": 0.208}[sampling], abs=0.01)
    shifted = FlowMatching(TimestepSampling(sampling, shift=3.0)).draw(20_000, torch.Generator().manual_seed(0)) / 1000
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_edm_is_what_its_own_sampler_undoes(prediction: Any, schedule: Any) -> None:
    scheduler = EDMEulerScheduler(prediction_type=prediction, sigma_schedule=schedule)
    objective = objective_of(scheduler)
    assert isinstance(objective, EDM)
    for step, sigma in zip(scheduler.timesteps[::250].tolist(), scheduler.sigmas[::250].tolist()):
        steps = torch.full((4,), step)
        noisy, target = objective.noisy(LATENTS, NOISE, steps), objective.target(LATENTS, NOISE, steps)
        sample = LATENTS + sigma * NOISE
        torch.testing.assert_close(noisy, scheduler.precondition_inputs(sample, sigma), rtol=1e-4, atol=1e-5)
        back = scheduler.precondition_outputs(sample, target, sigma)
        torch.testing.assert_close(back, LATENTS, rtol=1e-3, atol=1e-3)
        assert float(objective.loss(target, LATENTS, NOISE, steps)) == 0
    drawn = objective.draw(20_000, torch.Generator().manual_seed(0))
    own = scheduler.timesteps.float()
    assert float(own.min()) - 1e-5 <= float(drawn.min())
    assert float(drawn.max()) <= float(own.max()) + 1e-5
    assert float(drawn.mean()) == pytest.approx(float(own.mean()), abs=0.02)


def test_a_scheduler_of_which_it_is_not_known_what_is_learned() -> None:
    with pytest.raises(ConfigError, match="not known what a model under a EulerDiscreteScheduler"):
        objective_of(EulerDiscreteScheduler(timestep_type="continuous"))
    with pytest.raises(ConfigError, match="flow matching and EDM"):
        objective_of(EDMEulerScheduler(), snr_gamma=5.0)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="snr_gamma must be positive"):
        Denoising(DDPMScheduler(), snr_gamma=0)
    with pytest.raises(ConfigError, match="must be positive"):
        TimestepSampling(shift=0)
    with pytest.raises(ConfigError, match="logit_normal"):
        TimestepSampling("cosine")  # type: ignore[arg-type]


def test_the_scheduler_says_what_is_learned() -> None:
    found = objective_of(DDIMScheduler(prediction_type="v_prediction"), snr_gamma=5.0)
    assert isinstance(found, Denoising)
    assert (found.prediction, found.snr_gamma) == ("v_prediction", 5.0)
    assert objective_of(FlowMatchEulerDiscreteScheduler(shift=3.0)).timesteps == TimestepSampling(
        "logit_normal", shift=3.0
    )
    moving = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert objective_of(moving).timesteps.shift == 1.0
    with pytest.raises(ConfigError, match="set `timestep_sampling` instead"):
        objective_of(FlowMatchEulerDiscreteScheduler(), snr_gamma=5.0)


def test_timesteps_of_a_denoiser_follow_the_levels() -> None:
    scheduler = DDPMScheduler()
    steps = Denoising(scheduler).draw(20_000, torch.Generator().manual_seed(0))
    assert (int(steps.min()), int(steps.max())) == (0, 999)
    late = Denoising(scheduler, timesteps=TimestepSampling(shift=3.0)).draw(20_000, torch.Generator().manual_seed(0))
    assert float(late.float().mean()) > float(steps.float().mean()) + 100
