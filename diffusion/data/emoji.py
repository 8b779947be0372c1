"""The emoji world as a style to learn from a few drawings."""

from __future__ import annotations

import hashlib
from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.data.options import LoaderOptions
from mmpeft.diffusion.data.base import Sample, TextToImageData, as_sample, repeated, unique
from mmpeft.diffusion.style.emoji_judge import EmojiJudge
from mmpeft.embedded import EmojiSet, emoji
from mmpeft.embedded.captions import captions
from mmpeft.embedded.emoji import NATIVE
from mmpeft.errors import ConfigError, DataError
from mmpeft.types import Fields

SIZES = (32, NATIVE)
OTHERS = ("noto", "twemoji")  # what the embedded pipelines draw
SHOWN = 8


class EmojiStyle(TextToImageData):
    """Drawings of one style on white with their names; validation and test are of identities never trained on.

    The embedded pipelines were pretrained on Noto and Twemoji of the same training identities: OpenMoji is new to them.
    """

    small_batch = 128

    def __init__(
        self,
        style: str = "openmoji",
        images: int | None = 64,
        captions: Literal["name", "any"] = "name",
        template: str = "{}",
        test_images: int = 64,
        resolution: int | None = None,
        repeats: int = 1,
        batch_size: int = 16,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """
        Args:
            style: `openmoji`, `noto` or `twemoji`.
            images: training drawings, of each category its share, drawn by `seed`; those for n are among those for n +
                1. None for all.
            captions: `name` for the emoji's name, or `any` for another one of its captions in each epoch.
            template: what is said around each caption, such as `{}, outlined`: then the style is asked for by those
                words, and the test also draws prompts without them.
            test_images: test drawings, of each category its share, the same for every seed.
            resolution: 32 or 64; None for what the pipeline was made for.
            repeats: how often an epoch shows each drawing.
            batch_size: drawings a training step and process.
            options: those of `DataModule`; `seed` is of the choice of drawings and the captions too.

        Raises:
            ConfigError: the style, the kind of captions or the resolution is unknown.
            DataError: there are fewer training drawings than `images`.
        """
        super().__init__(resolution, repeats, batch_size=batch_size, **options)
        if captions not in ("name", "any"):
            raise ConfigError(f"captions is name or any, got {captions!r}")
        self.style, self.any = style, captions == "any"
        known = emoji(style, "train").labels
        if images is not None and not 1 <= images <= len(known):
            raise DataError(f"images is a number of training drawings in 1 … {len(known)}, got {images}")
        if template.count("{}") != 1:
            raise ConfigError(f"template has one {{}} for the caption, got {template!r}")
        tested = len(emoji(style, "test"))
        if not 1 <= test_images <= tested:
            raise ConfigError(f"test_images is a number of test drawings in 1 … {tested}, got {test_images}")
        self.template, self.test_images = template, test_images
        self.rows = spread(known, len(known) if images is None else images, self.seed)

    def cut(self, resolution: int, multiple: int) -> None:
        if resolution not in SIZES:
            raise ConfigError(
                f"emoji are drawn with {NATIVE} pixels: resolution is 32 or 64, got {resolution}; set it here, or take "
                "an embedded pipeline"
            )
        train, val, test = (emoji(self.style, split, resolution) for split in ("train", "val", "test"))
        self.train_set = repeated(Drawings(train, self.rows, self.any, self.template), self.repeats)
        self.val_set = self._tested(val, list(range(len(val))))
        self.test_set = self._tested(test, spread(test.labels, self.test_images, 0))

    def _tested(self, drawn: EmojiSet, rows: list[int]) -> Tested:
        other = None
        if self.template != "{}":
            style = next(style for style in OTHERS if style != self.style)
            other = emoji(style, drawn.split, drawn.images.shape[-1])
        return Tested(Drawings(drawn, rows, template=self.template), drawn, rows, other)

    def judge(self) -> EmojiJudge:
        """Evaluators trained on the emoji that this run is not tuned to."""
        assert self.resolution is not None
        return EmojiJudge(self.resolution, self.style, emoji(self.style, "train").identity[self.rows].tolist())

    @property
    def samples(self) -> int:
        return len(self.rows)

    def prompts(self) -> list[str]:
        train = captions(emoji(self.style, "train"))
        others = (said[0] for split in ("val", "test") for said in captions(emoji(self.style, split)))
        own = (text for row in self.rows for text in train[row][: None if self.any else 1])
        return unique(self.template.format(text) for text in (*own, *others))

    def val_prompts(self, count: int = SHOWN) -> list[str]:
        """Names of validation emoji from all categories, the same for every seed: what a grid may show."""
        val = emoji(self.style, "val")
        said = captions(val)
        return [self.template.format(said[row][0]) for row in spread(val.labels, count, 0)]


class Drawings(Dataset[Sample]):
    """Emoji on white, with their names or with any of their captions."""

    def __init__(
        self, drawn: EmojiSet, rows: list[int] | None = None, any_caption: bool = False, template: str = "{}"
    ) -> None:
        rows = list(range(len(drawn))) if rows is None else rows
        said = [[template.format(text) for text in own] for own in captions(drawn)]
        self.images, self.captions = drawn.rgb()[rows], [said[row] for row in rows]
        self.any_caption = any_caption
        self.keys = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:32] for image in self.images]

    def __len__(self) -> int:
        """Return the number of drawings."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Return one sample; a random caption is drawn from torch's global generator."""
        said = self.captions[index]
        text = said[int(torch.randint(len(said), ()))] if self.any_caption else said[0]
        return as_sample(self.images[index], text, (NATIVE, NATIVE), (0, 0), self.keys[index])


class Tested(Dataset[Fields]):
    """Drawings with their category, and, where the style is asked for by words, the same without them: the name alone
    (`plain`), and how another style draws it (`plain_image`)."""

    def __init__(self, drawings: Drawings, drawn: EmojiSet, rows: list[int], other: EmojiSet | None) -> None:
        self.drawings, self.labels = drawings, drawn.labels[rows]
        self.names = [captions(drawn)[row][0] for row in rows]
        self.others = None if other is None else other.rgb()[rows].float() / 127.5 - 1

    def __len__(self) -> int:
        """Return the number of drawings."""
        return len(self.drawings)

    def __getitem__(self, index: int) -> Fields:
        """Return one sample with what else is known of it."""
        sample = {**self.drawings[index], "label": self.labels[index]}
        if self.others is not None:
            sample |= {"plain": self.names[index], "plain_image": self.others[index]}
        return sample


def spread(labels: Tensor, count: int, seed: int) -> list[int]:
    """Rows of `count` samples drawn by `seed`, of each class its share; the choice for n is part of that for n + 1."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        own = order[labels[order] == label]
        places[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    return [int(row) for row in places.argsort(stable=True)[:count]]
