"""Evaluators of what a pipeline draws: scores of its images, and how far they are from real ones (KID)."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance


class Judge(ABC):
    """Scores images [B, 3, H, W] in [0, 1]; what it makes of real images is the ceiling of any score.

    `features` maps uint8 images to features [B, d], as torchmetrics asks for them. Nothing of it may have been trained
    on what is judged, nor on the images that a run is tuned on.
    """

    features: nn.Module

    @abstractmethod
    def accuracy(self, images: Tensor, prompts: Sequence[str], labels: Tensor | None = None) -> dict[str, float]:
        """Shares of images that are what their prompts asked for, by measure; `labels` [B] number their classes."""

    def kid(self, images: Tensor, real: Tensor) -> tuple[float, float]:
        """Kernel distance between drawn and real images over `features`: mean and spread over subsets.

        Unbiased at small n, unlike FID (arXiv:1801.01401). It compares on these features: no Inception network is at
        work, and numbers of different evaluators do not compare.
        """
        size = min(len(images), len(real))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = KernelInceptionDistance(self.features, subsets=100, subset_size=max(2, size // 2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for batch, is_real in ((real, True), (images, False)):
                metric.update(eight_bits(batch), real=is_real)
            mean, spread = metric.compute()
        return float(mean), float(spread)


def judged(
    judge: Judge, images: Mapping[str, Tensor], prompts: Mapping[str, Sequence[str]], labels: Tensor | None
) -> dict[str, float]:
    """Scores `<kind>/<measure>` of images by kind, with the prompts of each.

    KID is to images by hand: `real`, and `plain_real` for kinds that start with `plain`. Where there is no
    `plain_real`, it is to what the base draws.
    """
    found: dict[str, float] = {}
    for kind, own in images.items():
        for measure, value in judge.accuracy(own, prompts[kind], labels).items():
            found[f"{kind}/{measure}"] = value
        plain = kind.startswith("plain")
        reference = ("plain_real" if "plain_real" in images else "plain_base") if plain else "real"
        if kind != reference and not kind.endswith("real"):
            found[f"{kind}/kid"], found[f"{kind}/kid_spread"] = judge.kid(own, images[reference])
    return found


def eight_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
