"""Image transforms from torchvision v2: what every image gets, and three strengths of augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms import InterpolationMode, v2

from mmpeft.types import Leaf, Transform

AUGMENTS = ("none", "light", "strong")


class OfImage:
    """Apply a transform to the image that a sample begins with: `(image, label or identifier)`."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, sample: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """Return the transformed image as a plain tensor, and the rest unchanged."""
        return self.transform(sample[0]), *sample[1:]


def evaluation(size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """Resize to `size` × `size` without a crop, scale to [0, 1], normalise: float `[3, size, size]`."""
    return v2.Compose([v2.ToImage(), *_finish(size, mean, std)])


def training(augment: str, size: int, mean: Sequence[float], std: Sequence[float], paper: int | None) -> v2.Compose:
    """Augment, then do what `evaluation` does.

    Args:
        augment: one of `AUGMENTS`.
        size: height and width in pixels of the result.
        mean: three channel means of images in [0, 1].
        std: three channel deviations.
        paper: grey value behind drawings, 0 or 255: they are moved over it, and never cropped or mirrored, because
            a mirrored digit or letter is another one. None for photographs.
    """
    moves: list[v2.Transform] = []
    last: list[v2.Transform] = []
    if augment != "none" and paper is not None:
        # Bilinear moves over a fill other than zero leave a dark line at the old border; over zero they do not.
        moves = [v2.RandomAffine(10, (0.08, 0.08), (0.85, 1.1), interpolation=_BILINEAR)]
        if paper:
            moves = [v2.RandomInvert(1.0), *moves, v2.RandomInvert(1.0)]
    elif augment != "none":
        share = (0.7, 1.0) if augment == "light" else (0.35, 1.0)
        moves = [v2.RandomResizedCrop(size, share, interpolation=_BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
    if augment == "strong":
        moves.append(v2.RandAugment(fill=paper if paper is not None else 128))
        last = [v2.RandomErasing(0.25)]
    return v2.Compose([v2.ToImage(), *moves, *_finish(size, mean, std), *last])


_BILINEAR, _BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC


def _finish(size: int, mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [
        v2.Resize((size, size), interpolation=_BICUBIC, antialias=True),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
        v2.ToPureTensor(),
    ]
