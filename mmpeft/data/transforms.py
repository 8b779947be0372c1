"""Image transforms from torchvision v2: what every image gets, and three strengths of augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from mmpeft.data.contract import Resizing
from mmpeft.types import Leaf, Transform

AUGMENTS = ("none", "light", "strong")
SQUASH = Resizing()
Picture = Any  # a PIL image or a tensor [C, H, W]
_BILINEAR, _BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
OF_TENSORS = (_BILINEAR, _BICUBIC, InterpolationMode.NEAREST)


class OfImage:
    """Apply a transform to the image that a sample begins with: `(image, label or identifier)`."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, sample: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """Return the transformed image as a plain tensor, and the rest unchanged."""
        return self.transform(sample[0]), *sample[1:]


class Resized:
    """A picture of any shape at one size, exactly as timm and open_clip bring it there.

    A PIL image is resized by Pillow, as theirs are; a tensor [C, H, W] by torch.
    """

    def __init__(self, size: int | Sequence[int], resizing: Resizing) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.resizing = resizing
        self.interpolation = InterpolationMode(resizing.interpolation)
        self.inner = [math.floor(side / resizing.share) for side in self.size]

    def __call__(self, image: Picture) -> Picture:
        """Return the picture at that size, of the type that it came in."""
        if isinstance(image, Tensor) and self.interpolation not in OF_TENSORS:
            return functional.pil_to_tensor(self(functional.to_pil_image(image)))
        height, width = functional.get_size(image)
        resized = functional.resize(image, self._within(height, width), self.interpolation, antialias=True)
        return self._cut(resized)

    def _within(self, height: int, width: int) -> list[int]:
        """Height and width before the crop, or the shorter of them alone."""
        high, wide = self.inner
        if self.resizing.mode == "squash":
            return self.inner
        if self.resizing.mode == "shortest" and high == wide:
            return [high]  # torchvision's rule for the shorter side, which cuts where the other rounds
        choose = max if self.resizing.mode == "longest" else min
        ratio = choose(height / high, width / wide)
        return [max(round(side / ratio), 1) for side in (height, width)]

    def _cut(self, image: Picture) -> Picture:
        height, width = functional.get_size(image)
        high, wide = self.size
        beside, above = max(wide - width, 0), max(high - height, 0)
        if beside or above:
            borders = [beside // 2, above // 2, (beside + 1) // 2, (above + 1) // 2]
            fill = self.resizing.fill if self.resizing.mode == "longest" else 0
            image = functional.pad(image, borders, fill=list(fill) if isinstance(fill, tuple) else fill)
        height, width = functional.get_size(image)
        if (height, width) == self.size:
            return image
        return functional.crop(image, round((height - high) / 2), round((width - wide) / 2), high, wide)


def evaluation(
    size: int | Sequence[int], mean: Sequence[float], std: Sequence[float], resizing: Resizing = SQUASH
) -> v2.Compose:
    """Bring to `size` (height and width, or the side of a square), scale to [0, 1], normalise: float `[3, H, W]`."""
    return v2.Compose([Resized(size, resizing), v2.ToImage(), *_finish(mean, std)])


def training(
    augment: str,
    size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    paper: int | None,
    resizing: Resizing = SQUASH,
) -> v2.Compose:
    """Augment, then do what `evaluation` does.

    Args:
        augment: one of `AUGMENTS`.
        size: height and width in pixels of the result, or the side of a square.
        mean: three channel means of images in [0, 1].
        std: three channel deviations.
        paper: grey value behind drawings, 0 or 255: they are moved over it, and never cropped or mirrored, because
            a mirrored digit or letter is another one. None for photographs.
        resizing: what `evaluation` does, where nothing is augmented.
    """
    if augment == "none":
        return evaluation(size, mean, std, resizing)
    size = [size, size] if isinstance(size, int) else list(size)
    moves: list[v2.Transform] = []
    last: list[v2.Transform] = []
    if paper is not None:
        # Bilinear moves over a fill other than zero leave a dark line at the old border; over zero they do not.
        moves = [v2.RandomAffine(10, (0.08, 0.08), (0.85, 1.1), interpolation=_BILINEAR)]
        if paper:
            moves = [v2.RandomInvert(1.0), *moves, v2.RandomInvert(1.0)]
    else:
        share = (0.7, 1.0) if augment == "light" else (0.35, 1.0)
        moves = [v2.RandomResizedCrop(size, share, interpolation=_BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
    if augment == "strong":
        moves.append(v2.RandAugment(fill=paper if paper is not None else 128))
        last = [v2.RandomErasing(0.25)]
    return v2.Compose([v2.ToImage(), *moves, _whole(size), *_finish(mean, std), *last])


def _whole(size: Sequence[int]) -> v2.Transform:
    return v2.Resize(list(size), interpolation=_BICUBIC, antialias=True)


def _finish(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.Lambda(_shares), v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]


def _shares(image: Tensor) -> Tensor:
    """uint8 as floats in [0, 1], divided: torchvision's v2 multiplies, which timm and open_clip do not."""
    return image.to(torch.float32).div(255)
