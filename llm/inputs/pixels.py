"""Pictures and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mmpeft.llm.inputs.request import ROWS, Request, first
from mmpeft.types import Config

_GRID = 4
_PAIRS = ("superglue", "lightglue", "efficientloftr")
_FRAMES = ("instructblipvideo",)
_SQUARES = ("kimi", "paddleocr_vl", "neomme")  # patches that keep their height and width
_LISTED = ("pi0", "granite_docling")  # which of the pictures are there, besides
_LISTS = (
    *_LISTED,
    "idefics",
    "idefics2",
    "idefics3",
    "smolvlm",
    "modernvbert",
    "colmodernvbert",
    "ultravbert",
    "perception_lm",
)


def _tower(request: Request) -> Config:
    """The config of what reads pixels."""
    config = request.config
    if hasattr(config, "patch_size") and not hasattr(config, "text_config"):
        return config
    return request.part("vision", "image", "visual", "vit")


def _channels(request: Request) -> int:
    tower = _tower(request)
    found = (getattr(tower, name, None) for name in ("num_channels", "in_channels", "in_chans"))
    return next((v for v in found if isinstance(v, int)), 3)


def _side(request: Request) -> tuple[int, int]:
    """Height and width of a picture."""
    tower = _tower(request)
    if ratios := request.find("scaled_images_ratios"):  # the smallest copy is one crop
        return (round(_patch(request) / min(ratios)),) * 2
    for module in request.model.modules():  # a tower of timm's, first what it was made with
        if getattr(module, "strict_img_size", False) and (size := getattr(module, "img_size", None)):
            return int(size[0]), int(size[1])
    for module in request.model.modules():
        cfg = getattr(module, "default_cfg", None)
        if isinstance(cfg, dict) and cfg.get("fixed_input_size"):
            return int(cfg["input_size"][1]), int(cfg["input_size"][2])
    if request.kind.endswith("_rec"):  # a line of writing
        return 48, 320
    own = (getattr(tower, n, None) for n in ("image_size", "img_size", "input_size", "max_img_size"))
    size = next((s for s in own if s is not None), None) or request.find("image_size", "img_size", default=64)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    return (int(size[0]), int(size[-1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _patch(request: Request) -> int:
    return first(getattr(_tower(request), "patch_size", None) or request.find("patch_size", default=14))


def _patches(request: Request, frames: int = 1) -> tuple[Tensor, Tensor]:
    """Patches in one long row, and the grid of each picture."""
    tower, patch = _tower(request), _patch(request)
    time = first(getattr(tower, "temporal_patch_size", None) or 1)
    time = first(getattr(tower, "patch_temporal", None) or time)
    if request.kind.startswith("inkling2"):
        merge = int(request.find("spatial_merge_size"))
        grid = torch.tensor([[1, _GRID // merge, _GRID // merge]] * ROWS)
        return request.noise(int(grid.prod(-1).sum()), patch * merge, patch * merge, _channels(request)), grid
    grid = torch.tensor([[frames, _GRID, _GRID]] * ROWS)
    count, channels = ROWS * frames * _GRID * _GRID, _channels(request)
    if request.kind.startswith(_SQUARES):
        return request.noise(count, channels, patch, patch), grid
    return request.noise(count, channels * time * patch * patch), grid


def _convolutions(request: Request) -> Iterator[nn.Module]:
    return (m for m in request.model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d))


def _pixels(request: Request) -> object:
    names, kind = request.names, request.kind
    if request.lacks("vision"):
        return None
    if "pixel_values_videos" in request.required or request.main == "pixel_values_videos":
        return None
    if "image_grid_thw" in names or "grid_thw" in names:
        pixels, grid = _patches(request)
        if kind == "colqwen2":
            pixels = pixels.unflatten(0, (ROWS, -1))
        if "images_per_sample" in names:  # and the grid of the picture to make
            return {
                "pixel_values": pixels,
                "image_grid_thw": grid.repeat_interleave(2, 0),
                "images_per_sample": torch.tensor([2] * ROWS),
            }
        return {
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "grid_thw": grid,
            "merge_sizes": _merges(request),
            "image_merge_sizes": _merges(request),
        }
    (high, wide), channels, patch = _side(request), _channels(request), _patch(request)
    if "spatial_shapes" in names:
        return {
            "pixel_values": request.noise(ROWS, _GRID * _GRID, channels * patch * patch),
            "spatial_shapes": torch.tensor([[_GRID, _GRID]] * ROWS),
            "pixel_attention_mask": torch.ones(ROWS, _GRID * _GRID, dtype=torch.long),
        }
    if "image_token_pooling" in names:  # each token is made of four patches
        count = ROWS * _GRID * _GRID
        return {
            "pixel_values": request.noise(ROWS, _GRID * _GRID, channels * patch * patch),
            "image_token_pooling": torch.arange(count).view(-1, _GRID),
            "image_grids": torch.tensor([[_GRID // 2, _GRID // 2, 0, 0]] * ROWS),
        }
    if "pixel_position_ids" in names or "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(_GRID), torch.arange(_GRID)).repeat(ROWS, 1, 1)
        pixels = request.noise(ROWS, _GRID * _GRID, channels * patch * patch)
        return {"pixel_values": pixels, "pixel_position_ids": places, "image_position_ids": places}
    if "aspect_ratio_ids" in names:
        tiles = int(request.find("max_num_tiles"))
        return {
            "pixel_values": request.noise(ROWS, 1, tiles, channels, high, wide),
            "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(ROWS, 1, tiles, dtype=torch.long),
        }
    frames = request.find("num_frames", "frames_per_clip", "num_image_with_embedding")
    if isinstance(frames, int) and frames > 1:
        return request.noise(ROWS, frames, channels, high, wide)
    pinpoints = request.find("image_grid_pinpoints")
    if pinpoints is not None and "image_sizes" in names:
        grids = [(-(-a // high) * -(-b // wide), [a, b]) for a, b in pinpoints]
        count, shape = min(grids)
        tiles = 1 + count  # the whole picture is one more
        return {
            "pixel_values": request.noise(ROWS, tiles, channels, high, wide),
            "image_sizes": torch.tensor([shape] * ROWS),
        }
    if kind == "inkling_mm_model":
        time = first(request.find("temporal_patch_size", default=2))
        return request.noise(ROWS * 4, time, patch, patch, channels)
    if kind in ("nemotron_h_omni", "neomme"):
        return request.noise(ROWS * _GRID * _GRID, channels * patch * patch)
    if kind == "fuyu":
        return request.noise(ROWS, _GRID * _GRID, channels * patch * patch)
    if kind.startswith("minicpm") and "target_sizes" in names:  # patches side by side
        return request.noise(1, channels, patch, ROWS * _GRID * _GRID * patch)
    if kind in _FRAMES:
        return request.noise(ROWS, 4, channels, high, wide)
    if kind in _PAIRS:
        return request.noise(ROWS, 2, channels, high, wide)
    if kind in _LISTS:
        pictures = request.noise(ROWS, 1, channels, high, wide)
        mask = torch.ones(ROWS, 1, dtype=torch.bool)
        return {"pixel_values": pictures, "pixel_attention_mask": mask} if kind in _LISTED else pictures
    return request.noise(ROWS, channels, high, wide)


def _merges(request: Request) -> Tensor:
    return torch.tensor([int(request.find("spatial_merge_size", default=1))] * ROWS)


def _states_of_patches(request: Request) -> object:
    if "grid_thw" not in request.names:
        if isinstance(first_convolution := next(_convolutions(request), None), nn.Conv1d):
            channels = first_convolution.in_channels
            return request.noise(ROWS, channels, 3840 if channels == 1 else 4)  # waves, or what makes them
        wide = int(request.find("hidden_size", "d_model", default=1))
        return request.noise(ROWS, _GRID, wide) if "hidden_states" in request.required else None
    pixels, grid = _patches(request)
    return {"hidden_states": pixels, "grid_thw": grid}


def _videos(request: Request) -> object:
    """Where a model needs a video or reads nothing else."""
    wanted = "pixel_values_videos" in request.required or request.main == "pixel_values_videos"
    if not wanted and not request.kind.startswith("pe_audio_video"):
        return None
    if "video_grid_thw" in request.names:
        pixels, grid = _patches(request)
        return {"pixel_values_videos": pixels, "video_grid_thw": grid}
    (high, wide), frames = _side(request), request.find("num_frames", "frames_per_clip", default=4)
    return request.noise(ROWS, int(frames), _channels(request), high, wide)


def _grid_sizes(request: Request) -> Tensor:
    return torch.tensor([[_GRID, _GRID]] * ROWS)


def _sizes(request: Request) -> Tensor | None:
    if "image_sizes" not in request.required and getattr(_tower(request), "model_type", "") != "pixtral":
        return None
    return torch.tensor([list(_side(request))] * ROWS)


def _flat(request: Request) -> Tensor:
    """Patches with their row and column in front."""
    places = torch.cartesian_prod(torch.arange(1.0, _GRID + 1), torch.arange(1.0, _GRID + 1)).repeat(ROWS, 1, 1)
    wide = request.find("patch_embed_hidden_size", default=_channels(request) * _patch(request) ** 2)
    return torch.cat([places, request.noise(ROWS, _GRID * _GRID, int(wide))], -1)


def _prompt(request: Request) -> dict[str, Tensor]:
    high, wide = _side(request)
    shape = (ROWS, _channels(request), high // 2 if request.kind == "seggpt" else high, wide)
    return {
        "pixel_values": request.noise(*shape),
        "prompt_pixel_values": request.noise(*shape),
        "prompt_masks": request.noise(*shape),
    }


def _finer(request: Request) -> Tensor:
    tower = request.part("high_res")
    return request.noise(ROWS, 3, *([first(tower.image_size)] * 2))


PIXELS: dict[str, Callable[[Request], object]] = {
    "pixel_values": _pixels,
    "pixel_values_videos": _videos,
    "hidden_states": _states_of_patches,
    "image_sizes": _sizes,
    "image_grid_hw": lambda request: _grid_sizes(request) if request.kind == "nemotron_h_omni" else None,
    "target_sizes": lambda request: _grid_sizes(request) if request.kind.startswith("minicpm") else None,
    "flattened_patches": _flat,
    "prompt_pixel_values": _prompt,
    "high_res_pixel_values": _finer,
    "input_points": lambda request: torch.full((ROWS, 1, 1, 2), 4.0),
}
