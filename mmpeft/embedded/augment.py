"""Batched augmentation of drawings with an alpha channel: pose, colour, ink outlines, background.

Made for pretraining that should survive a change of drawing style. Pure functions of a batch and a generator;
everything runs on whole batches, because on small images per-sample transforms would cost more than the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class StyleAugment:
    """Draw `[B, 4, H, W]` RGBA (in [0, 1], straight alpha) as `[B, 3, H, W]` RGB in another pose and style.

    Ranges are `(low, high)`; `p_*` are probabilities for each image. Colour is kept close to the original,
    because it carries meaning (flags, fruit, skin); outlines and fills change freely.
    """

    scale: tuple[float, float] = (0.75, 1.12)
    rotation: float = 12.0
    shift: float = 0.1
    aspect: float = 0.15
    shear: float = 0.15
    saturation: tuple[float, float] = (0.6, 1.6)
    contrast: tuple[float, float] = (0.8, 1.3)
    brightness: float = 0.12
    p_hue: float = 0.1
    p_gray: float = 0.05
    p_outline: float = 0.5
    p_hollow: float = 0.15
    p_white: float = 0.8
    p_blur: float = 0.1

    def __call__(self, rgba: Tensor, generator: Generator) -> Tensor:
        batch = _Batch(len(rgba), generator)
        rgb, alpha = self._drawn(rgba, batch)
        colour = torch.rand(len(rgba), 3, 1, 1, generator=generator)
        paper = torch.where(batch.on(self.p_white), torch.ones(()), colour)
        flat = rgb * alpha + paper * (1 - alpha)
        return torch.where(batch.on(self.p_blur), _blur(flat), flat).clamp(0, 1)

    def mosaic(self, rgba: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Four drawings a picture, `[4B, 4, H, W]` on `[B, 3, 2H, 2W]`, and what each covers, `[B, 4, 2H, 2W]`.

        The paper is white or goes from one light colour to another; the whole is moved around by up to a third of a
        drawing, so that places mean nothing. For features of regions (arXiv:2312.11376).
        """
        batch, (height, width) = _Batch(len(rgba) // 4, generator), rgba.shape[-2:]
        rgb, alpha = (_tiled(x) for x in self._drawn(rgba, _Batch(len(rgba), generator)))
        ends = 1 - 0.3 * torch.rand(2, batch.size, 3, 1, 1, generator=generator)
        ends = torch.where(batch.on(self.p_white), torch.ones(()), ends)
        slope = (torch.linspace(0, 1, 2 * height)[:, None] + torch.linspace(0, 1, 2 * width)) / 2
        pictures = rgb * alpha + torch.lerp(ends[0], ends[1], slope) * (1 - alpha)
        cells = torch.eye(4).view(1, 4, 2, 2).repeat_interleave(height, 2).repeat_interleave(width, 3)
        move = torch.randint(-height // 3, height // 3 + 1, (2,), generator=generator).tolist()
        return pictures.roll(move, (2, 3)).clamp(0, 1), (cells * alpha).roll(move, (2, 3))

    def _drawn(self, rgba: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Colour and alpha of each drawing in another pose and style."""
        posed = self._pose(torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1), batch)
        alpha = posed[:, 3:].clamp(0, 1)
        rgb = self._recolour((posed[:, :3] / alpha.clamp(min=1e-3)).clamp(0, 1), batch)
        inked, inked_alpha = self._outline(rgb, alpha, batch)
        chosen = batch.on(self.p_outline)
        return torch.where(chosen, inked, rgb), torch.where(chosen, inked_alpha, alpha)

    def _pose(self, premultiplied: Tensor, batch: _Batch) -> Tensor:
        scale, angle = batch.uniform(*self.scale), batch.uniform(-self.rotation, self.rotation) * math.pi / 180
        aspect, shear = batch.uniform(-self.aspect, self.aspect).exp(), batch.uniform(-self.shear, self.shear)
        flip = torch.where(batch.on(0.5), -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        across, down = flip * aspect / scale, 1 / (aspect * scale)
        move_x, move_y = (batch.uniform(-self.shift, self.shift) / scale for _ in range(2))
        top = torch.cat([across * cos, across * (shear * cos - sin), move_x], 3)
        bottom = torch.cat([down * sin, down * (shear * sin + cos), move_y], 3)
        grid = F.affine_grid(torch.cat([top, bottom], 2)[:, 0], list(premultiplied.shape), align_corners=False)
        return F.grid_sample(premultiplied, grid, align_corners=False)

    def _recolour(self, rgb: Tensor, batch: _Batch) -> Tensor:
        to = torch.tensor(YIQ)
        hue = torch.where(batch.on(self.p_hue), batch.uniform(-0.5, 0.5), batch.uniform(-0.03, 0.03))
        chroma = torch.where(batch.on(self.p_gray), torch.zeros(()), batch.uniform(*self.saturation))
        cos, sin = (2 * math.pi * hue).cos() * chroma, (2 * math.pi * hue).sin() * chroma
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        rows = [torch.cat(row, 3) for row in ([one, zero, zero], [zero, cos, -sin], [zero, sin, cos])]
        matrix = torch.linalg.inv(to) @ torch.cat(rows, 2)[:, 0] @ to
        rgb = torch.einsum("bij,bjhw->bihw", matrix, rgb)
        brightness = batch.uniform(-self.brightness, self.brightness)
        return ((rgb - 0.5) * batch.uniform(*self.contrast) + 0.5 + brightness).clamp(0, 1)

    def _outline(self, rgb: Tensor, alpha: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Dark lines where colour or alpha changes, over flat (posterised) or white fill."""
        seen = F.pad(_blur(torch.cat([rgb * alpha + (1 - alpha), alpha], 1)), (1, 1, 1, 1), mode="replicate")
        across = seen[:, :, 1:-1, 2:] - seen[:, :, 1:-1, :-2]
        down = seen[:, :, 2:, 1:-1] - seen[:, :, :-2, 1:-1]
        edge = (across.square() + down.square()).sqrt().amax(1, keepdim=True)
        ink = torch.sigmoid((edge - batch.uniform(0.12, 0.35)) * 25)
        ink = torch.where(batch.on(0.3), F.max_pool2d(ink, 3, 1, 1), ink)
        levels = torch.randint(2, 6, (batch.size, 1, 1, 1), generator=batch.generator).float()
        fill = torch.where(batch.on(0.5), (rgb * levels).round() / levels, rgb)
        fill = torch.where(batch.on(self.p_hollow), torch.ones(()), fill)
        return fill * (1 - ink) + batch.uniform(0.0, 0.25) * ink, torch.maximum(alpha, ink)


@dataclass(frozen=True)
class _Batch:
    """Random numbers of shape `[B, 1, 1, 1]`."""

    size: int
    generator: Generator

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.size, 1, 1, 1, generator=self.generator) * (high - low) + low

    def on(self, probability: float) -> Tensor:
        return torch.rand(self.size, 1, 1, 1, generator=self.generator) < probability


def _tiled(drawings: Tensor) -> Tensor:
    """`[4B, C, H, W]` to `[B, C, 2H, 2W]`, four in a square."""
    _, channels, height, width = drawings.shape
    square = drawings.view(-1, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return square.reshape(-1, channels, 2 * height, 2 * width)


def _blur(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
