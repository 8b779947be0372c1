"""Waves and spectrograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.llm.request import ROWS, Request, first

_FRAMES = 64


def _bins(request: Request) -> int:
    return first(
        request.find(
            "num_mel_bins",
            "input_feat_per_channel",
            "feature_size",
            "feat_size",
            "input_dim",
            "n_mels",
            "mel_bins",
            default=80,
        )
    )


def _features(request: Request) -> Tensor:
    """[rows, bins, frames] where the first convolution runs over frames, else [rows, frames, bins]."""
    bins = _bins(request)
    frames = _FRAMES
    longest = request.find("max_source_positions", "n_ctx")
    if any(isinstance(m, nn.Conv1d) and m.in_channels == bins for m in request.model.modules()):
        strides = [m.stride[0] for m in request.model.modules() if isinstance(m, nn.Conv1d)][:2]
        frames = longest * max(strides, default=1) if longest else frames
        return request.noise(ROWS, bins, frames)
    return request.noise(ROWS, frames, bins)


def _features_mask(request: Request) -> Tensor:
    made = _features(request)
    return torch.ones(ROWS, max(made.shape[1:]), dtype=torch.long)


def _values(request: Request) -> Tensor:
    bins = request.find("num_mel_bins")
    length = request.find("max_length")
    if bins is not None and isinstance(length, int) and request.find("patch_size"):
        return request.noise(ROWS, length, bins)
    if request.find("audio_channels", "hop_length", "upsampling_ratios", "downsampling_ratios"):
        return request.noise(ROWS, 1, 3840)
    return request.noise(ROWS, 4000)


SOUNDS: dict[str, Callable[[Request], Any]] = {
    "input_features": _features,
    "input_values": _values,
    "input_features_mask": lambda request: (
        _features_mask(request) if "input_features_mask" in request.required else None
    ),
}
