"""Example inputs are accepted by open_clip's pairs, whatever their towers, and by one tower alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmpeft.vla.inputs import example_inputs
from tests.zoo import open_clip_models

PAIRS = {
    "ViT-B-32": (224, 77),
    "RN50": (224, 77),
    "coca_ViT-B-32": (224, 76),
    "ViT-B-16-SigLIP-256": (256, 64),  # a timm tower, and pooling at the last token
    "roberta-ViT-B-32": (224, 77),  # a Hugging Face tower
    "mt5-base-ViT-B-32": (224, 77),  # one without positions
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    image, text = _accepted(open_clip_models.build(name))
    size, length = PAIRS[name]
    assert image.shape == (2, 3, size, size)
    assert text.shape == (2, length)


def test_one_tower_alone() -> None:
    pair = open_clip_models.build("coca_ViT-B-32")
    assert _accepted(pair.visual)[0].shape == (2, 3, 224, 224)
    assert _accepted(pair.text)[0].shape == (2, 76)
    assert len(_accepted(pair.text_decoder)) == 2
    timm_tower = open_clip_models.build("ViT-B-16-SigLIP-256").visual
    assert _accepted(timm_tower)[0].shape == (2, 3, 256, 256)


def test_a_text_ends_where_its_tower_pools() -> None:
    model = open_clip_models.build("ViT-B-32")
    _, text = _accepted(model)
    assert (text.argmax(-1) == text.shape[1] - 1).all()


def test_parts_and_strangers_have_none() -> None:
    model = open_clip_models.build("ViT-B-32")
    assert example_inputs(model.visual.transformer) is None
    assert example_inputs(nn.Linear(2, 2)) is None


def _accepted(model: nn.Module) -> tuple[Any, ...]:
    found = example_inputs(model)
    assert found is not None
    args, kwargs = found
    assert kwargs == {}
    with torch.no_grad():
        model.eval()(*args)
    return args
