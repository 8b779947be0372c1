"""Decoders from the features of patches to a value at each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.tasks.taps import Taps, grid_of


class DenseDecoder(nn.Module):
    """`a ← T_i(W_i f_i + a)` from the deepest tap up, then transposed convolutions: maps [B, out, H, W] of images.

    CLIPSeg's decoder without a text (Lüddecke and Ecker, arXiv:2112.10003).
    """

    def __init__(self, layers: Sequence[int] | None = None, width: int = 64, heads: int = 4) -> None:
        """
        Args:
            layers: depths of the blocks to decode from; None for three spread over the tower.
            width: of the decoder's tokens.
            heads: of its attention.

        Raises:
            ConfigError: heads do not divide the width.
        """
        super().__init__()
        check_heads(width, heads)
        self.wanted, self.width, self.heads = layers, width, heads

    def start(self, taps: Taps, out: int, image: tuple[int, int]) -> None:
        """Build what trains for a tower that sees images of a size (height, width), with `out` values a pixel."""
        self.depths = taps.layers(self.wanted)[::-1]
        self.reduce = nn.ModuleList(nn.Linear(taps.width, self.width) for _ in self.depths)
        self.blocks = token_blocks(self.width, self.heads, len(self.depths))
        self.up = upsampler(self.width, out, image[0] // taps.grid(image)[0])

    def forward(self, taps: Taps, images: Tensor) -> Tensor:
        """Maps [B, out, H, W] of images [B, 3, H, W]."""
        features = taps(images, self.depths)
        x: Tensor | float = 0.0
        for depth, reduce, block in zip(self.depths, self.reduce, self.blocks):
            x = block(reduce(taps.patches(features[depth])) + x)
        assert isinstance(x, Tensor)
        grid = grid_of(x.shape[1], images.shape[-2:])
        return resized(self.up(x.transpose(1, 2).unflatten(2, grid)), images)


def token_blocks(width: int, heads: int, count: int) -> nn.ModuleList:
    """Transformer blocks over the decoder's tokens, without dropout."""
    blocks = (nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True) for _ in range(count))
    return nn.ModuleList(blocks)


def upsampler(width: int, out: int, patch: int) -> nn.Sequential:
    """From a token a patch, [B, width, rows, columns], to `out` values a pixel of patches `patch` pixels wide."""
    half = max(patch // 4, 1)
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, width // 2, half, stride=half),
        nn.ReLU(),
        nn.ConvTranspose2d(width // 2, out, patch // half, stride=patch // half),
    )


def resized(maps: Tensor, images: Tensor) -> Tensor:
    """Maps [B, C, h, w] at the images' height and width."""
    if maps.shape[-2:] == images.shape[-2:]:
        return maps
    return F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)


def check_heads(width: int, heads: int) -> None:
    """Raise ConfigError unless heads divide the width."""
    if heads < 1 or width < 1 or width % heads:
        raise ConfigError(f"{heads} heads do not divide a width of {width}")
