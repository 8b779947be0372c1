"""Kept latents and text features: a file is read again only where every fact it depends on is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.style.cache import Cache, latent_facts, text_facts
from tests.tasks.tiny_pipelines import pipeline


def latents(pipe: Any, folder: Path) -> bool:
    """Whether a latent is computed, and not read; it is right in either case."""
    family = family_of(pipe)
    return _computed(Cache([family.vae], folder, *latent_facts(family)), lambda: family.encode_image(IMAGE))


def texts(pipe: Any, folder: Path) -> bool:
    family = family_of(pipe)
    cache = Cache(list(family.encoders.values()), folder, *text_facts(family))
    return _computed(cache, lambda: family.encode_prompt(["a dog"])["text"])


def _computed(cache: Cache, compute: Callable[[], torch.Tensor]) -> bool:
    asked = []
    with torch.no_grad():
        right = compute()

        def one(rows: list[int]) -> list[dict[str, torch.Tensor]]:
            asked.append(rows)
            return [{"x": compute()[0]}]

        found = cache.fill(["key"], one)["key"]["x"]
    assert found.dtype == right.dtype
    assert torch.equal(found, right[0])
    return bool(asked)


IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def scaled(pipe: Any) -> None:
    pipe.vae.register_to_config(scaling_factor=0.3)


def shifted(pipe: Any) -> None:
    pipe.vae.register_to_config(shift_factor=0.25)


def halved(pipe: Any) -> None:
    pipe.vae.to(torch.bfloat16)
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipe, name).to(torch.bfloat16)


def one_weight(pipe: Any) -> None:
    """A single number of a large tensor, which a sample of it would not see."""
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer("dog")["input_ids"][1], 3] += 1
        pipe.vae.encoder.conv_in.weight[-1, -1, 1, 0] += 1


def limited(pipe: Any) -> None:
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokenizer.model_max_length = 24


def respelled(pipe: Any) -> None:
    pipe.tokenizer.pad_token = pipe.tokenizer.convert_ids_to_tokens(5)


@pytest.mark.parametrize("change", [scaled, shifted, halved, one_weight])
def test_latents_are_of_this_autoencoder(change: Callable[[Any], None], tmp_path: Path) -> None:
    pipe = copy.deepcopy(pipeline("sdxl"))
    assert latents(pipe, tmp_path)
    assert not latents(pipe, tmp_path)
    change(pipe)
    assert latents(pipe, tmp_path)
    assert not latents(pipe, tmp_path)


@pytest.mark.parametrize("change", [halved, one_weight, limited, respelled])
def test_text_features_are_of_these_encoders(change: Callable[[Any], None], tmp_path: Path) -> None:
    pipe = copy.deepcopy(pipeline("sdxl"))
    assert texts(pipe, tmp_path)
    pipe.tokenizer(["other words"], padding="max_length", truncation=True)  # what a call leaves behind is no fact
    assert not texts(pipe, tmp_path)
    change(pipe)
    assert texts(pipe, tmp_path)
    assert not texts(pipe, tmp_path)


def test_autocast_is_another_value(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    assert latents(pipe, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert latents(pipe, tmp_path)
    assert not latents(pipe, tmp_path)
