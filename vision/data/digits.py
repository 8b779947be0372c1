"""Handwritten digits of scikit-learn: 1797 images of 8×8 pixels, ten classes, no download."""

from __future__ import annotations

from collections import defaultdict
from typing import Unpack

import torch
from sklearn.datasets import load_digits

from mmpeft.data.images import ImageData, Pairs
from mmpeft.data.options import ImageOptions
from mmpeft.data.sampling import hash_seed

TEST_SHARE, VAL_SHARE = 0.2, 0.1


class DigitsData(ImageData):
    """Digits 0 to 9, white on black, enlarged to the backbone's size.

    The split is fixed and does not depend on `seed`: in each class the images are ordered by a hash of their number;
    the first fifth is test, the next tenth val, the rest train.
    """

    paper = 0
    small_batch = 256

    def __init__(self, **options: Unpack[ImageOptions]) -> None:
        """Options as in `ImageData`."""
        super().__init__(**options)
        self.classes = [str(digit) for digit in range(10)]

    def datasets(self, stage: str | None = None) -> None:
        """Set all four sets; prediction takes the test images, named by their number in scikit-learn's array."""
        found = load_digits()
        grey = (torch.tensor(found.images) * (255 / 16)).round().to(torch.uint8)  # [1797, 8, 8] in 0..16
        images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
        labels = torch.tensor(found.target, dtype=torch.int64)
        rows = split_rows(labels.tolist())
        self.train_set, self.val_set, self.test_set = (
            Pairs(images[rows[split]], labels[rows[split]]) for split in ("train", "val", "test")
        )
        self.predict_set = Pairs(images[rows["test"]], [f"digit{row:04d}" for row in rows["test"]])


def split_rows(labels: list[int]) -> dict[str, list[int]]:
    """Return the rows of train, val and test, stratified by label."""
    own: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        own[label].append(row)
    out: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for rows in own.values():
        rows.sort(key=lambda row: hash_seed(row))
        first, second = round(TEST_SHARE * len(rows)), round((TEST_SHARE + VAL_SHARE) * len(rows))
        out["test"] += rows[:first]
        out["val"] += rows[first:second]
        out["train"] += rows[second:]
    return {split: sorted(rows) for split, rows in out.items()}
