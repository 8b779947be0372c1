"""What timm's and torchvision's models take: a small batch for any of them, made without importing either library.

A model's own record of its size comes first, since it may have been built for another one than its pretrained
weights were: `patch_embed.img_size`, `image_size`, positions counted. timm's configuration is asked after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmpeft.types import AnyModule, Args, Json, Kwargs

Inputs = tuple[Args, Kwargs]

SIDE = 224
"""Side of an image where the model fixes none: every family takes it, and it is the size most were trained at."""
ROWS = 2


def example_inputs(model: nn.Module) -> Inputs | None:
    """Two rows that a timm or torchvision model takes, on the CPU; None for any other model."""
    for cls in type(model).__mro__:
        if _within(cls.__module__, "timm.models"):
            return _timm(model)
        if _within(cls.__module__, "torchvision.models"):
            return _torchvision(model, cls)
    return None


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _timm(model: nn.Module) -> Inputs | None:
    configuration = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    # a block of a timm model comes from timm as well, but takes features; only whole models have either
    if not configuration and not hasattr(model, "forward_features"):
        return None
    channels = getattr(model, "in_chans", None) or _channels(model)
    return (_image(model, int(channels), *_timm_size(model, configuration)),), {}


def _timm_size(model: AnyModule, configuration: Json) -> tuple[int, int]:
    default = (configuration.get("input_size") or (3, SIDE, SIDE))[-2:]
    own, fixed = None, bool(configuration.get("fixed_input_size", False))
    for module in model.modules():  # the model itself, its patch embedding, or that of a wrapped model
        if getattr(module, "img_size", None) is not None:
            own, fixed = _pair(module.img_size), bool(getattr(module, "strict_img_size", fixed))
            break
    traits = getattr(model, "_traits", None) or {}  # timm >= 1.0.31 remembers what a model was built with
    own = own or (_pair(traits["img_size"]) if traits.get("img_size") else None)
    fixed = bool(traits.get("fixed_input_size", fixed))
    size = own or _pair(default)
    if fixed or max(size) <= SIDE:
        return size
    smallest = configuration.get("min_input_size")
    if smallest:
        return _pair(smallest[-2:])
    return SIDE, SIDE


def _torchvision(model: nn.Module, cls: type[nn.Module]) -> Inputs:
    package = cls.__module__.removeprefix("torchvision.models.").split(".")[0]
    if package == "detection":
        return _detection(model)
    if package == "optical_flow":
        return (_image(model, 3, 128, 128, seed=0), _image(model, 3, 128, 128, seed=1)), {}  # RAFT's smallest
    if package == "video" or cls.__name__ == "SwinTransformer3d":
        return (_image(model, _channels(model), *_clip_size(model)),), {}
    return (_image(model, _channels(model), *_torchvision_size(model, cls)),), {}


def _torchvision_size(model: AnyModule, cls: type[nn.Module]) -> tuple[int, int]:
    if hasattr(model, "image_size"):  # VisionTransformer
        return _pair(model.image_size)
    if cls.__name__ == "MaxVit":  # the first stage runs behind two strides of 2, on windows of a fixed grid
        height, width = next(m.grid_size for m in model.modules() if type(m).__name__ == "MaxVitBlock")
        return 4 * int(height), 4 * int(width)
    return (299, 299) if "Inception" in cls.__name__ else (SIDE, SIDE)


def _clip_size(model: AnyModule) -> tuple[int, int, int]:
    """Frames, height and width of a clip."""
    positions = getattr(model, "pos_encoding", None)
    if positions is None:  # S3D's pools need at least 16 frames of full size
        side = SIDE if any(isinstance(m, nn.AvgPool3d) for m in model.modules()) else 112
        return 16, side, side
    stride = next(m.stride for m in model.modules() if isinstance(m, nn.Conv3d))  # MViT counts its positions
    size = (positions.temporal_size, *positions.spatial_size)
    frames, height, width = (int(n) * int(s) for n, s in zip(size, stride))
    return frames, height, width


def _detection(model: AnyModule) -> Inputs:
    """A list of images, and in training mode what is to be found in them."""
    images = list(_image(model, _channels(model), SIDE, SIDE))
    if not model.training:
        return (images,), {}
    parts = {type(module).__name__ for module in model.modules()}
    target: dict[str, Tensor] = {"boxes": torch.tensor([[20.0, 20.0, 180.0, 160.0]]), "labels": torch.tensor([1])}
    if "MaskRCNN" in type(model).__name__ or "MaskRCNNPredictor" in parts:
        target["masks"] = torch.ones(1, SIDE, SIDE, dtype=torch.uint8)
    if "KeypointRCNNPredictor" in parts:
        points = int(next(m.kps_score_lowres for m in model.modules() if hasattr(m, "kps_score_lowres")).out_channels)
        target["keypoints"] = torch.tensor([60.0, 60.0, 1.0]).expand(1, points, 3).clone()
    return (images, [dict(target) for _ in images]), {}


def _channels(model: nn.Module) -> int:
    """Channels of the image: what the first convolution reads."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return int(module.in_channels)
    return 3


def _image(model: nn.Module, channels: int, *size: int, seed: int = 0) -> Tensor:
    """Values in [0, 1) in the dtype of the model's weights."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    image = torch.rand(ROWS, channels, *size, generator=torch.Generator().manual_seed(seed))
    return image.to(next(floats, torch.float32))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
