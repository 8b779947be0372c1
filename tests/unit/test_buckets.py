"""Aspect buckets: no distortion, one bucket a batch, facts of a crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmpeft.data.sampling import EpochSampler
from mmpeft.diffusion.data.buckets import BucketSampler, bucket_sizes, crop, nearest_size
from tests.unit.captioned_pictures import MIXED, captioned, epoch, opened, same


def test_bucket_sizes() -> None:
    sizes = bucket_sizes(1024, 64)
    assert [size for size in sizes if size[0] <= size[1]] == [
        (768, 1344),
        (832, 1216),
        (896, 1152),
        (960, 1088),
        (1024, 1024),
    ]
    assert {(width, height) for height, width in sizes} == set(sizes)


@given(st.integers(1, 64), st.sampled_from([1, 4, 8, 16, 64]))
def test_buckets_hold_no_more_pixels_than_the_square_and_are_multiples(times: int, multiple: int) -> None:
    resolution = times * multiple
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert all(h % multiple == 0 == w % multiple and 0 < h * w <= resolution**2 for h, w in sizes)
    assert len(sizes) < 16


@given(st.integers(8, 3000), st.integers(8, 3000), st.floats(0, 1))
def test_the_window_has_the_aspect_of_its_bucket_and_lies_in_the_image(height: int, width: int, place: float) -> None:
    sizes = bucket_sizes(512, 64)
    bucket = sizes[nearest_size((height, width), sizes)]
    found = crop((height, width), bucket, place)
    left, top, right, bottom = found.box
    assert (bottom - top) / (right - left) == pytest.approx(bucket[0] / bucket[1], rel=1e-9)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)  # as large as can be
    assert (bottom - top) * found.scale == pytest.approx(bucket[0])
    assert all(side >= 0 for side in found.corner)


def test_a_circle_stays_one(tmp_path: Path) -> None:
    """Moments of a disc in each direction, after a photo of an odd shape has gone into its bucket."""
    tmp_path.joinpath("x.txt").write_text("a disc")
    y, x = np.mgrid[:301, :487]
    disc = (((y - 150) ** 2 + (x - 243) ** 2) < 90**2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "x.png")
    image = opened(tmp_path, 128, 8).train_set[0]["image"]
    assert image.shape == (3, 96, 168)
    weight = (image[0] + 1) / 2
    rows, columns = torch.arange(96.0)[:, None], torch.arange(168.0)[None]
    spreads = [((a - (a * weight).sum() / weight.sum()) ** 2 * weight).sum() / weight.sum() for a in (rows, columns)]
    assert float(spreads[0] / spreads[1]) == pytest.approx(1, abs=2e-3)


def test_images_go_to_the_nearest_aspect_and_batches_hold_one_bucket(tmp_path: Path) -> None:
    data = opened(captioned(tmp_path / "mixed", MIXED), batch_size=2)
    batches = epoch(data.train_dataloader(), 0)
    shapes = [tuple(batch["image"].shape[-2:]) for batch in batches]
    assert set(shapes) == {(64, 64), (48, 80), (80, 48), (72, 56)}
    assert [len(batch["image"]) for batch in batches] == [2] * (3 + 2 + 2 + 1)
    for batch, (height, width) in zip(batches, shapes):
        assert batch["target_size"].tolist() == [[height, width]] * 2
    keys = {key for batch in batches for key in batch["key"]}
    assert len(keys) == len(MIXED)
    square = opened(tmp_path / "mixed", batch_size=2, buckets=False)
    assert {tuple(batch["image"].shape) for batch in square.train_dataloader()} == {(2, 3, 64, 64), (1, 3, 64, 64)}


def test_one_bucket_is_plain_batches() -> None:
    for world in (1, 3):
        for rank in range(world):
            plain = EpochSampler(23, shuffle=True, seed=4, num_replicas=world, rank=rank)
            found = BucketSampler([7] * 23, 4, seed=4, num_replicas=world, rank=rank)
            assert len(plain) == len(found)
            assert list(plain) == list(found)


def test_facts_of_a_crop(tmp_path: Path) -> None:
    """What SDXL is told: the upright size before, where the crop lies in the resized image, and its own size."""
    captioned(tmp_path, [(100, 300)])
    sample = opened(tmp_path, buckets=False).train_set[0]
    assert sample["original_size"].tolist() == [100, 300]
    assert sample["crop"].tolist() == [0, 64]  # 64 × 192, cut to the 64 in the middle
    assert sample["target_size"].tolist() == [64, 64]


def test_random_crops_and_mirrored_images(tmp_path: Path) -> None:
    captioned(tmp_path, [(100, 300)])
    random = opened(tmp_path, buckets=False, crop="random")
    found = [epoch(random.train_dataloader(), number)[0] for number in range(8)]
    assert "key" not in found[0]
    corners = [batch["crop"][0].tolist() for batch in found]
    assert len({left for _, left in corners}) > 4
    assert all(top == 0 and 0 <= left <= 128 for top, left in corners)
    assert same(found, [epoch(random.train_dataloader(), number)[0] for number in range(8)])

    plain = opened(tmp_path, buckets=False).train_set[0]
    mirrored = opened(tmp_path, buckets=False, mirror=True)
    found = [epoch(mirrored.train_dataloader(), number)[0] for number in range(8)]
    assert len({batch["key"][0] for batch in found}) == 2
    for batch in found:
        flipped = batch["key"][0] != plain["key"]
        assert torch.equal(batch["image"][0], plain["image"].flip(-1) if flipped else plain["image"])
        assert batch["crop"].tolist() == [[0, 64]]


def test_the_corner_of_a_mirrored_crop_is_that_in_the_mirrored_image(tmp_path: Path) -> None:
    """On a ramp from left to right the mean of a crop says where it was, and its slope whether it is mirrored."""
    Image.fromarray(np.tile(np.arange(192, dtype=np.uint8), (64, 1))).save(tmp_path / "ramp.png")
    data = opened(tmp_path, prompt="a ramp", buckets=False, mirror=True, crop="random")
    slopes = set()
    for number in range(12):
        (batch,) = epoch(data.train_dataloader(), number)
        values = (batch["image"][0, 0, 0] + 1) * 127.5
        mirrored = bool(values[0] > values[-1])
        start = float(values.mean()) - 31.5
        assert int(batch["crop"][0, 1]) == pytest.approx(128 - start if mirrored else start, abs=1)
        slopes.add(mirrored)
    assert slopes == {True, False}
