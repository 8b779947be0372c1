"""Aspect buckets: images of any shape in batches of one shape, cropped and never distorted."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmpeft.data.sampling import EpochSampler, hash_seed

Size = tuple[int, int]  # height and width
ASPECT = 2.0  # of the longest bucket


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Sizes from the square to 1:2 and 2:1 with at most `resolution²` pixels and sides that are multiples.

    The shorter side goes down in steps of about a sixteenth of the resolution; the longer one is what then fits. For
    1024 and 64 they are among those SDXL was trained with: 1024×1024, 960×1088, 896×1152, 832×1216, 768×1344.
    """
    step = multiple * max(1, round(resolution / (16 * multiple)))
    least = math.ceil(resolution / math.sqrt(ASPECT) / step) * step
    sizes = {(resolution, resolution)}
    for short in range(least, resolution, step):
        long = resolution**2 // short // multiple * multiple
        sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(size: Size, sizes: Sequence[Size]) -> int:
    """Which of the sizes has the nearest ratio of height to width, `min |log(h/w) − log(h'/w')|`."""
    aspects = [math.log(height / width) for height, width in (size, *sizes)]
    return min(range(len(sizes)), key=lambda i: abs(aspects[i + 1] - aspects[0]))


@dataclass(frozen=True)
class Crop:
    """The part of an image that fills a bucket: as large as it can be, with exactly the bucket's aspect.

    One resampling of `box`, whose sides need not be whole pixels, resizes and crops at once: to resize first would
    round the other side and distort by up to half a pixel.
    """

    box: tuple[float, float, float, float]  # left, top, right, bottom in the image's own pixels
    scale: float  # bucket pixels an image pixel; above 1 the image is enlarged

    @property
    def corner(self) -> Size:
        """Top and left of the crop in the resized image, which SDXL is told."""
        return round(self.box[1] * self.scale), round(self.box[0] * self.scale)


def crop(size: Size, bucket: Size, place: float = 0.5) -> Crop:
    """The crop of an image of `size` for a bucket; `place` in [0, 1] is where it lies along the side that is cut."""
    (height, width), scale = size, max(bucket[0] / size[0], bucket[1] / size[1])
    high, wide = min(bucket[0] / scale, height), min(bucket[1] / scale, width)
    top, left = (height - high) * place, (width - wide) * place
    return Crop((left, top, min(left + wide, width), min(top + high, height)), scale)


class BucketSampler(EpochSampler):
    """An order in which every batch of all ranks holds samples of one bucket alone.

    Each bucket is shuffled and cut into whole batches, the last one filled up from the bucket's own start; then the
    batches are shuffled. All of that depends on `(seed, epoch)` only. Of one bucket it is `EpochSampler`'s order.
    """

    def __init__(
        self, buckets: Sequence[int], batch_size: int, *, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        """
        Args:
            buckets: the bucket of every sample.
            batch_size: samples a batch of one rank.
            seed: of the order.
            num_replicas: number of ranks.
            rank: the own one.
        """
        super().__init__(len(buckets), shuffle=True, seed=seed, num_replicas=num_replicas, rank=rank)
        self.buckets, self.global_batch = list(buckets), batch_size * num_replicas
        self.counts = Counter(self.buckets)

    def __len__(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        if len(self.counts) == 1:
            return super().__len__()
        batches = sum(-(-count // self.global_batch) for count in self.counts.values())
        return batches * self.global_batch // self.num_replicas

    def order(self) -> list[int]:
        order = super().order()
        if len(self.counts) == 1:
            return order
        own: dict[int, list[int]] = defaultdict(list)
        for row in order[: self.length]:
            own[self.buckets[row]].append(row)
        batches = [
            [rows[i % len(rows)] for i in range(start, start + self.global_batch)]
            for rows in own.values()
            for start in range(0, len(rows), self.global_batch)
        ]
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch, len(batches)))
        return [row for i in torch.randperm(len(batches), generator=generator).tolist() for row in batches[i]]

    def identity(self) -> dict[str, int]:
        return {**super().identity(), "buckets": hash_seed(*self.buckets)}
