"""What open_clip's models take: images and texts at a model's own sizes, made without importing the library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.types import AnyModule, Args, Kwargs

Inputs = tuple[Args, Kwargs]

ROWS = 2
LONGEST = 77
"""Tokens of a text where the tower would take more: position tables of Hugging Face models go far beyond a caption."""

IMAGES = {"VisionTransformer", "ModifiedResNet", "TimmModel"}
TEXTS = {"TextTransformer", "HFTextEncoder"}


def example_inputs(model: nn.Module) -> Inputs | None:
    """Two images and two texts for a pair, or two rows for one tower alone, on the CPU; None for any other module."""
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.split(".")[0] == "open_clip"}
    if not names:
        return None
    if names & IMAGES:
        return (_images(model, _dtype(model)),), {}
    if names & TEXTS:
        return (_texts(model),), {}
    if names & {"MultimodalTransformer"}:
        return _features(model), {}
    if hasattr(model, "visual") and (hasattr(model, "text") or hasattr(model, "token_embedding")):
        # CLIP holds the parts of its text tower itself; CoCa reads its decoder beyond the tower
        return (_images(model.visual, _dtype(model)), _texts(getattr(model, "text", model))), {}
    return None


def _images(tower: AnyModule, dtype: torch.dtype) -> Tensor:
    size = tower.image_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = next((m.in_channels for m in tower.modules() if isinstance(m, nn.Conv2d)), 3)
    image = torch.randn(ROWS, channels, height, width, generator=torch.Generator().manual_seed(0))
    return image.to(dtype)


def _texts(tower: AnyModule) -> Tensor:
    """Token numbers that end as the tower's pooling expects: with its end token, or with the highest number."""
    known = int(tower.vocab_size)
    length = min(int(tower.context_length) - 2 if _hugging_face(tower) else int(tower.context_length), LONGEST)
    length = length if length > 0 else LONGEST  # relative positions: any length will do
    # numbers from 4 on: padding, start and end of every tokenizer lie below
    ids = 4 + torch.arange(ROWS * length).view(ROWS, length) % max(1, known - 5)
    last = getattr(tower, "eos_id", None)
    if _hugging_face(tower):
        last = getattr(tower.config, "eos_token_id", None)
    ids[:, -1] = known - 1 if last is None else int(last)
    return ids


def _hugging_face(tower: AnyModule) -> bool:
    return getattr(tower, "config", None) is not None


def _features(decoder: AnyModule) -> tuple[Tensor, Tensor]:
    """Image and text features for CoCa's decoder."""
    width = int(decoder.ln_final.normalized_shape[0])
    generator = torch.Generator().manual_seed(0)
    dtype = _dtype(decoder)
    image = torch.randn(ROWS, 8, width, generator=generator).to(dtype)
    return image, torch.randn(ROWS, int(decoder.context_length), width, generator=generator).to(dtype)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
