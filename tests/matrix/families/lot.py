"""Families drawn by lot from the zoo, so that the matrix holds what nobody chose because it works.

For each of timm, torchvision and diffusers the first name, for transformers the first two, of
`random.Random("2026-11-30").sample(sorted(names), 6)`, the libraries in this order. Three of transformers' were
passed over (`minicpmv4_6`, `t5gemma2_encoder`, `got_ocr2`): features of all pictures take the places of words in one
go, so that the rows of a batch cannot each have a tuning of its own, and the next one took their place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from timm.models.tnt import TNT
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from mmpeft.sites import inputs_of
from tests.matrix.example import BATCH, Example, enliven, first
from tests.matrix.families.transformers import embeds
from tests.support.copies import copies
from tests.zoo import diffusers_models
from tests.zoo import hf as hf_models

PIXELS = 32


def _pictures(build: Callable[[], nn.Module], size: int = PIXELS) -> Example:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        enliven(model)
        return Example(model, torch.randn(BATCH, 3, size, size))


def _named(build: Callable[[str], nn.Module], name: str, read: Callable[[Any], Tensor] = first) -> Example:
    """A small model of the zoo, with twice as many rows of its example inputs."""
    with torch.random.fork_rng():
        model = build(name).eval()
        enliven(model)
        inputs = inputs_of(model)
        assert inputs is not None
        assert not inputs[0]
        torch.manual_seed(0)
        return Example(model, {key: _more(value) for key, value in inputs[1].items()}, read)


def _more(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.rand(BATCH, *value.shape[1:]) if value.dim() == 1 else torch.randn(BATCH, *value.shape[1:])
    return torch.cat([value, value.flip(-1)])


def _tnt() -> nn.Module:
    return TNT(PIXELS, 8, num_classes=5, embed_dim=48, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=3)


def _mobilevit() -> nn.Module:
    config = hf.MobileViTV2Config(
        image_size=2 * PIXELS,
        width_multiplier=0.25,
        n_attn_blocks=(1, 1, 1),
        base_attn_unit_dims=(64, 64, 64),
        num_labels=5,
    )
    model = hf.MobileViTV2ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # which start shut
            nn.init.ones_(module.weight)
    return model


FAMILIES = copies(
    {
        "tnt": partial(_pictures, _tnt),
        "resnet": partial(_pictures, lambda: ResNet(BasicBlock, [1, 2, 1, 1], num_classes=5)),
        "helios": partial(_named, diffusers_models.build, "HeliosTransformer3DModel"),
        "mobilevitv2": partial(_pictures, _mobilevit, 2 * PIXELS),
        "owlv2": partial(_named, hf_models.build, "owlv2", embeds),
    }
)
