"""One model of each of torchvision's architectures, the smallest by name."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import nn

NAMES = (
    "alexnet", "convnext_tiny", "deeplabv3_mobilenet_v3_large", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fcn_resnet50", "fcos_resnet50_fpn", "googlenet", "inception_v3",
    "keypointrcnn_resnet50_fpn", "lraspp_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "maxvit_t", "mc3_18",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "raft_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "retinanet_resnet50_fpn", "s3d",
    "shufflenet_v2_x0_5", "squeezenet1_0", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "swin3d_t", "swin_t",
    "swin_v2_t", "vgg11", "vit_b_32", "wide_resnet50_2",
)  # fmt: skip


def tried(name: str) -> tuple[str, ...]:
    """LoRA alone: they have their full size."""
    return ("LoRA",)


def names() -> list[str]:
    """Those of the models above that the installed torchvision has."""
    return sorted(set(NAMES) & set(torchvision.models.list_models()))


def build(name: str) -> nn.Module:
    """The model with random weights, the same in every call."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"weights": None}
    if any(word in name for word in ("rcnn", "retinanet", "fcos", "ssd", "fcn", "deeplab", "lraspp")):
        parts["weights_backbone"] = None
    if any(word in name for word in ("rcnn", "retinanet", "fcos")):
        parts |= {"min_size": 96, "max_size": 128}
    if any(word in name for word in ("rcnn", "retinanet", "fcos", "ssd")):  # random weights are sure of nothing
        parts["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
    if name in ("googlenet", "inception_v3"):
        parts["init_weights"] = False  # its truncated normal takes half a minute
    return torchvision.models.get_model(name, **parts)  # type: ignore[no-any-return]
