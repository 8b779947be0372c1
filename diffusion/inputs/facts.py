"""What the inputs of a denoiser depend on: its class, its configuration, the shape of its latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.types import Json

ROWS = 2
FRAMES = 4
SIDE = 4
"""Patches along each side of an image."""

TOKENS = {"LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel"}
TOKENS |= {"Krea2Transformer2DModel", "Ideogram4Transformer2DModel", "AceStepTransformer1DModel", "T5FilmDecoder"}
TOKENS |= {"LongCatAudioDiTTransformer", "MiniMaxH3Transformer3DModel"}
"""Classes whose latents come as a sequence of patches, though no position of patches is passed."""

FRAMES_FIRST = {"CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel", "UNetSpatioTemporalConditionModel"}
"""Classes whose videos are [B, F, C, H, W]; others take [B, C, F, H, W]."""

CHANNELS_LAST = {"Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel", "Kandinsky6SRTransformer3DModel"}
LINE = {"UNet1DModel", "StableAudioDiTModel", "StableAudio3DiTModel", "MiniMaxMusic3Transformer1DModel"}
"""Classes whose latents are [B, C, L]."""

VIDEO = {"I2VGenXLUNet", "UNetMotionModel", "SparseControlNetModel", "CosmosControlNetModel"}
"""Classes whose latents have frames, though their name does not say 3D."""


class Denoiser:
    """One model: what its class is called, what its configuration says, which parameters its `forward` has."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, set(names)
        config = model.config
        self.config: Json = dict(config) if isinstance(config, Mapping) else dict(vars(config))
        self.parameters = inspect.signature(model.forward).parameters
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(floats, torch.float32)
        self._generator = torch.Generator().manual_seed(0)

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of these settings that is set to something."""
        return next((self.config[key] for key in keys if self.config.get(key)), default)

    def size(self, *keys: str, default: int) -> int:
        """The same as one whole number: of a value for every level, the first."""
        found = self.get(*keys, default=default)
        while isinstance(found, list | tuple):
            found = found[0]
        return int(found)

    def noise(self, *shape: int) -> Tensor:
        """Normal random numbers in the dtype of the model."""
        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def text(self, width: int, length: int | None = None) -> Tensor:
        """Features of a prompt [B, L, width]."""
        return self.noise(ROWS, self.text_length if length is None else length, width)

    @property
    def text_length(self) -> int:
        """Tokens of a prompt: as many as positions were counted for, or a few."""
        return self.size("max_text_seq_length", "num_text_tokens", default=8)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        found = self.get("patch_size", "all_patch_size", default=1)
        if isinstance(found, list | tuple):
            found = (self.size("all_f_patch_size", default=1), *found, *found)[-3:]
            return int(found[0]), int(found[1]), int(found[2])
        return self.size("patch_size_t", default=1), int(found), int(found)

    @property
    def side(self) -> int:
        """Rows and columns of a latent image."""
        levels = self.get("down_block_types", "block_out_channels")
        if isinstance(levels, list | tuple):  # halved at every level; the last still has something to attend to
            return max(8, int(2 ** len(levels)))
        return SIDE * self.patch[1]

    @property
    def frames(self) -> int:
        """Frames of a latent video."""
        return FRAMES * self.patch[0]

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.size("in_channels", "in_visual_dim", "latent_channels", "io_channels", "latent_dim", default=4)

    @property
    def as_tokens(self) -> bool:
        """Whether the latents come as a sequence of patches."""
        return (
            bool(self.names & TOKENS or self.parameters.keys() & {"img_ids", "img_shapes"})
            and "img_sizes" not in self.parameters
        )

    @property
    def as_video(self) -> bool:
        """Whether the latents have frames."""
        return bool(self.names & VIDEO) or any("3D" in n or "SpatioTemporal" in n for n in self.names)

    def latent(self, channels: int | None = None) -> Tensor:
        """A noisy latent in the layout of the class."""
        channels = self.channels if channels is None else channels
        if self.as_tokens:
            return self.noise(ROWS, self.tokens, channels)
        if self.names & LINE:
            return self.noise(ROWS, channels, self.line)
        if self.names & CHANNELS_LAST:
            return self.noise(ROWS, self.frames, self.side, self.side, channels)
        if self.names & FRAMES_FIRST:
            return self.noise(ROWS, self.frames, channels, self.side, self.side)
        if self.as_video:
            return self.noise(ROWS, channels, self.frames, self.side, self.side)
        return self.noise(ROWS, channels, self.side, self.side)

    @property
    def tokens(self) -> int:
        """Patches of an image, or of a video."""
        return SIDE * SIDE * (FRAMES if self.as_video else 1)

    @property
    def line(self) -> int:
        """Samples of a latent sound."""
        if "UNet1DModel" in self.names:
            return max(64, int(2 ** (len(self.config["down_block_types"]) + 2)))
        return 16 * self.patch[1]


def rotation(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions [L, D]: any angle will do."""
    angle = torch.arange(length)[:, None] * torch.linspace(1.0, 0.1, width)[None]
    return angle.cos(), angle.sin()
