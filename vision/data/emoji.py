"""The emoji world as an image classification task."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from mmpeft.data.images import ImageData, Pairs, draw_shots
from mmpeft.data.options import ImageOptions
from mmpeft.embedded import EmojiSet, emoji
from mmpeft.embedded.emoji import composite


class EmojiData(ImageData):
    """Emoji of one drawing style into nine categories, split by identity: train, val, test share no emoji.

    Drawings lie on white; with `augment: strong` training drawings lie on a random solid colour.
    """

    paper = 255
    small_batch = 256

    def __init__(
        self,
        style: str = "openmoji",
        shots: int | None = None,
        **options: Unpack[ImageOptions],
    ) -> None:
        """
        Args:
            style: `openmoji`, `noto` or `twemoji`.
            shots: training images of each category, drawn by `seed`; None for all.
            options: those of `ImageData`.

        Raises:
            ConfigError: the style or another value is unknown or out of range.
            DataError: a category has fewer training images than `shots`.
        """
        super().__init__(**options)
        self.style, self.shots = style, shots
        known = emoji(style, "train")
        self.classes = known.classes
        self.rows = None if shots is None else draw_shots(known.labels, shots, len(known.classes), self.seed)

    def datasets(self, stage: str | None = None) -> None:
        """Set all four sets; prediction takes the test emoji, named by their code points."""
        train, val, test = (emoji(self.style, split) for split in ("train", "val", "test"))
        rows = torch.arange(len(train)) if self.rows is None else torch.tensor(self.rows)
        if self.augment == "strong":
            self.train_set = OnRandomColour(train, rows)
        else:
            self.train_set = Pairs(train.rgb()[rows], train.labels[rows])
        self.val_set, self.test_set = Pairs(val.rgb(), val.labels), Pairs(test.rgb(), test.labels)
        self.predict_set = Pairs(self.test_set.images, test.unified)


class OnRandomColour:
    """Emoji over a solid colour, drawn anew whenever a sample is read; white one time in two, as in evaluation."""

    def __init__(self, drawings: EmojiSet, rows: Tensor) -> None:
        self.images, self.labels = drawings.images[rows], drawings.labels[rows]

    def __len__(self) -> int:
        """Return the number of emoji."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return `(uint8 [3, H, W], label)`."""
        colour = torch.randint(0, 256, (3,), dtype=torch.uint8)
        paper = torch.where(torch.rand(()) < 0.5, torch.full_like(colour, 255), colour)
        return composite(self.images[index], paper), int(self.labels[index])
