"""Waves and spectrograms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmpeft.llm.inputs.request import ROWS, Request, first
from mmpeft.types import Kwargs

_FRAMES = 64
_MASKS = ("feature_attention_mask", "input_features_mask", "padding_mask")
_SAMPLES = 3840
_BINS_FIRST = ("clvp", "dots3_note", "qwen3_asr", "qwen3_omni")
_BINS = (
    "num_mel_bins", "input_feat_per_channel", "feature_size", "feat_size", "input_dim", "n_mels", "mel_bins",
    "feature_projection_input_dim", "num_mel_channels", "model_in_channels", "input_feat_size",
)  # fmt: skip


def _bins(request: Request) -> int:
    if request.kind == "musicgen_melody":
        return int(request.find("num_chroma"))
    if request.kind == "pop2piano":  # it has turned the bins into its own width
        return int(request.config.d_model)
    if request.kind.startswith("granite_speech5"):
        return 4 * int(request.find("num_mel_bins"))
    stacked = request.find("num_stacked_frames")
    if stacked:
        return int(stacked) * int(request.find("num_mel_bins"))
    part = request.part("audio", "speech", "encoder")
    own = next((v for n in _BINS if isinstance(v := getattr(part, n, None), int)), None)
    return first(own or request.find(*_BINS, default=128))


def _channels_first(request: Request, bins: int) -> list[nn.Conv1d]:
    """The first convolutions over frames, where they read the bins as channels."""
    found = [m for m in request.model.modules() if isinstance(m, nn.Conv1d)][:2]
    reads = found and found[0].in_channels == bins and found[0].groups == 1 and found[0].kernel_size[0] > 1
    return found if reads else []


def _features(request: Request) -> Kwargs:
    """[rows, bins, frames] where a convolution over frames reads them first, else [rows, frames, bins]."""
    if request.lacks("audio") or request.kind == "speech-encoder-decoder":
        return {}
    bins, frames = _bins(request), _FRAMES
    convolutions = _channels_first(request, bins)
    if convolutions and (longest := request.find("max_source_positions", "n_ctx")):
        frames = longest * max(m.stride[0] for m in convolutions)
    if window := request.find("n_window"):
        frames = -(-frames // (2 * window)) * 2 * window
    if request.find("spec_size"):
        features = request.noise(ROWS, 1, frames, bins)
    elif (convolutions or request.kind.startswith(_BINS_FIRST)) and request.kind != "speech_to_text":
        features = request.noise(ROWS, bins, frames)
    else:
        features = request.noise(ROWS, frames, bins)
    mask = torch.ones(ROWS, frames, dtype=torch.bool if request.kind == "gemma3n" else torch.long)
    wanted = ["feature_attention_mask", "input_features_mask" if "encoder" in request.kind else ""]
    return {"input_features": features, **{n: mask for n in _MASKS if n in request.required or n in wanted}}


def _values(request: Request) -> object:
    """Waves, with a channel where the model tells channels; or what a spectrogram transformer calls so."""
    if request.main == "input_features" and "input_values" not in request.required:
        return None
    bins, length = request.find("num_mel_bins"), request.find("max_length")
    if isinstance(bins, int) and isinstance(length, int) and request.find("patch_size"):
        return request.noise(ROWS, length, bins)
    channels = request.find("audio_channels", "upsampling_ratios", "downsampling_ratios")
    if request.kind.startswith("omniasr") or channels:
        return request.noise(ROWS, 1, _SAMPLES)
    return request.noise(ROWS, _SAMPLES)


def _waves_mask(request: Request) -> Tensor | None:
    if "padding_mask" not in request.required or "input_values" not in request.names:
        return None
    return torch.ones(ROWS, _SAMPLES, dtype=torch.long)


def _mel(request: Request) -> dict[str, Tensor]:
    mel = request.noise(ROWS, _FRAMES, int(request.find("input_feat_size", default=128)))
    return {"audio_mel": mel, "audio_mel_mask": torch.zeros(ROWS, _FRAMES, dtype=torch.bool)}


SOUNDS: dict[str, Callable[[Request], object]] = {
    "input_features": _features,
    "padding_mask": _waves_mask,
    "input_values": _values,
    "audio_mel": _mel,
    "chunk_sample_lengths": lambda request: torch.full((ROWS,), 160 * _FRAMES),
}
