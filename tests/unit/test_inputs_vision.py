"""Example inputs are accepted by the models they are made for, whatever size and channels those were built with."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.maxvit import MaxVit

from mmpeft.vision.inputs import example_inputs

TIMM: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "test_vit": ({"img_size": 96, "in_chans": 5}, (2, 5, 96, 96)),
    "crossvit_tiny_240": ({}, (2, 3, 240, 240)),  # two patch embeddings of different sizes
    "levit_128s": ({"img_size": 128}, (2, 3, 128, 128)),  # no module says its size
    "tresnet_m": ({"in_chans": 1}, (2, 1, 224, 224)),  # the first convolution reads 16 channels for one
    "test_mambaout": ({}, (2, 3, 160, 160)),
    "resnet18": ({"features_only": True, "in_chans": 2}, (2, 2, 224, 224)),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    built, shape = TIMM[name]
    model = timm.create_model(name, **built)
    args, kwargs = _accepted(model)
    assert args[0].shape == shape
    assert kwargs == {}


def _vit() -> nn.Module:
    return tv.VisionTransformer(image_size=64, patch_size=16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64)


def _maxvit() -> nn.Module:
    return MaxVit(
        input_size=(64, 64), stem_channels=16, partition_size=2, block_channels=[16], block_layers=[1], head_dim=8,
        stochastic_depth_prob=0.0,
    )  # fmt: skip


def _video() -> nn.Module:
    block = tv.video.mvit.MSBlockConfig(1, 16, 16, [3, 3, 3], [1, 2, 2], [1, 1, 1], [1, 1, 1])
    settings = [block, block]
    return tv.video.MViT(spatial_size=(32, 32), temporal_size=4, block_setting=settings, residual_pool=False,
                         residual_with_cls_embed=False, rel_pos_embed=False, proj_after_attn=False)  # fmt: skip


TORCHVISION = {
    "vit": (_vit, (2, 3, 64, 64)),
    "maxvit": (_maxvit, (2, 3, 64, 64)),
    "mvit": (_video, (2, 3, 4, 32, 32)),
    "raft": (lambda: tv.optical_flow.raft_small(weights=None), (2, 3, 128, 128)),
    "segmentation": (lambda: tv.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), (2, 3, 224, 224)),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    build, shape = TORCHVISION[name]
    args, _ = _accepted(build())
    assert all(image.shape == shape for image in args)


@pytest.mark.parametrize("training", [False, True])
def test_a_detector_takes_a_list_and_in_training_what_is_to_be_found(training: bool) -> None:
    build = tv.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = build(weights=None, weights_backbone=None).train(training)
    args, kwargs = example_inputs(model) or ((), {})
    with torch.no_grad():
        out = model(*args, **kwargs)
    assert ("loss_classifier" in out) if training else len(out) == 2


def test_the_dtype_is_that_of_the_weights() -> None:
    args, _ = example_inputs(timm.create_model("test_vit").to(torch.bfloat16)) or ((), {})
    assert args[0].dtype == torch.bfloat16


def test_parts_and_strangers_have_none() -> None:
    assert example_inputs(timm.create_model("test_vit").blocks[0]) is None
    assert example_inputs(nn.Sequential(nn.Conv2d(3, 4, 1))) is None


def _accepted(model: nn.Module) -> Any:
    found = example_inputs(model)
    assert found is not None
    args, kwargs = found
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    return found
