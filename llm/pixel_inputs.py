"""Pictures and videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmpeft.llm.request import ROWS, Request, first

_VISION = ("vision", "image", "visual", "backbone", "encoder")
_GRID = 4


def _tower(request: Request) -> Any:
    return (
        request.part("vision", "image", "visual")
        if hasattr(request.config, "text_config") or not hasattr(request.config, "patch_size")
        else request.config
    )


def _channels(request: Request) -> int:
    tower = _tower(request)
    for name in ("num_channels", "in_channels", "in_chans"):
        value = getattr(tower, name, None)
        if isinstance(value, int):
            return value
    return 3


def _side(request: Request) -> tuple[int, int]:
    tower = _tower(request)
    size = next(
        (s for n in ("image_size", "img_size", "input_size") if (s := getattr(tower, n, None)) is not None), None
    )
    size = size if size is not None else request.find("image_size", "img_size", default=64)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def _patches(request: Request) -> dict[str, Any]:
    """Patches in one long row beside the grid of each picture."""
    tower = _tower(request)
    patch, time = first(getattr(tower, "patch_size", 14)), first(getattr(tower, "temporal_patch_size", 1) or 1)
    grid = torch.tensor([[1, _GRID, _GRID]] * ROWS)
    pixels = request.noise(ROWS * _GRID * _GRID, _channels(request) * time * patch * patch)
    return {"pixel_values": pixels, "hidden_states": pixels, "image_grid_thw": grid, "grid_thw": grid}


def _pixels(request: Request) -> Any:
    names = request.names
    if "image_grid_thw" in names or "grid_thw" in names:
        return _patches(request)
    high, wide = _side(request)
    channels = _channels(request)
    if "spatial_shapes" in names:
        patch = first(getattr(_tower(request), "patch_size", 16))
        return {
            "pixel_values": request.noise(ROWS, _GRID * _GRID, channels * patch * patch),
            "spatial_shapes": torch.tensor([[_GRID, _GRID]] * ROWS),
            "pixel_attention_mask": torch.ones(ROWS, _GRID * _GRID, dtype=torch.long),
        }
    frames = request.find("num_frames", "frames_per_clip", "num_image_with_embedding")
    picture = request.noise(ROWS, channels, high, wide)
    if isinstance(frames, int) and frames > 1:
        return request.noise(ROWS, frames, channels, high, wide)
    if request.find("image_grid_pinpoints") is not None and "image_sizes" in names:
        return {
            "pixel_values": request.noise(ROWS, 3, channels, high, wide),
            "image_sizes": torch.tensor([[high, wide]] * ROWS),
        }
    if "pixel_attention_mask" in names:
        return request.noise(ROWS, 1, channels, high, wide)
    return picture


def _sizes(request: Request) -> Tensor | None:
    if "image_sizes" not in request.required and getattr(_tower(request), "model_type", "") != "pixtral":
        return None
    return torch.tensor([list(_side(request))] * ROWS)


PIXELS: dict[str, Callable[[Request], Any]] = {
    "pixel_values": _pixels,
    "hidden_states": lambda request: _patches(request) if "grid_thw" in request.names else None,
    "image_sizes": _sizes,
}
