"""Images with texts for an image-text pair: a table or folder of files, tar shards, or Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpeft.data.caption_sources import open_captions
from mmpeft.data.captioned import Captioned
from mmpeft.data.images import FALLBACK_MEAN, FALLBACK_SIZE, FALLBACK_STD, Augment
from mmpeft.data.loading import DataModule
from mmpeft.data.pictures import PICTURES, read
from mmpeft.data.transforms import evaluation, training
from mmpeft.vla.backbone import check_length

__all__ = ["PICTURES", "CaptionData", "open_captions", "read"]


class CaptionData(DataModule):
    """Batches `(images float [B, 3, S, S], texts: B strings)`; to evaluate, with their rows int64 [B] as well."""

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        image_column: str = "image",
        text_column: str = "text",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int | None = 256,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment = "light",
    ) -> None:
        """
        Args:
            train: a .csv, .tsv or .jsonl file, a folder with metadata.jsonl or a .txt beside each image, tar shards
                (`shards/train-*.tar`), or `datasets`' `<name>[:<split>]`.
            val: the same for validation.
            test: the same for the test; None for what `val` is.
            image_column: column of the images.
            text_column: column of the texts.
            batch_size: pairs a training step and process.
            num_workers: loading processes; the batches do not depend on it.
            seed: of the order and the augmentation.
            eval_batch_size: pairs a validation or test step.
            image_size: height and width in pixels; None for what the pair was pretrained with.
            mean: three channel means of images in [0, 1]; None for the pair's.
            std: three channel deviations; None for the pair's.
            augment: `none`, `light` or `strong`.
        """
        super().__init__(batch_size, num_workers, seed, eval_batch_size)
        self.sources = {"train": train, "val": val, "test": test or val}
        self.columns = (image_column, text_column)
        self.image_size, self.augment = image_size, augment
        self.mean, self.std = mean, std
        self.collate = collate
        self._set_transforms()

    def configure(self, image_size: int | Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        """Take size and normalisation from the pair where the user has given none."""
        own = image_size if isinstance(image_size, int) else image_size[-1]
        self.image_size, self.mean, self.std = self.image_size or own, self.mean or mean, self.std or std
        self._set_transforms()

    def _set_transforms(self) -> None:
        size, mean, std = self.image_size or FALLBACK_SIZE, self.mean or FALLBACK_MEAN, self.std or FALLBACK_STD
        self.train_transform = OfFirst(training(self.augment, size, mean, std, None))
        self.eval_transform = OfFirst(evaluation(size, mean, std))

    def datasets(self, stage: str | None = None) -> None:
        """Open what is named, each source once."""
        opened: dict[str, Captioned] = {}
        for name, source in self.sources.items():
            if source is not None:
                opened[source] = opened.get(source) or open_captions(source, *self.columns)
                setattr(self, f"{name}_set", opened[source])

    def check(self, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        """Raise DataError for a text that a tokenizer would cut."""
        for found in (self.train_set, self.val_set, self.test_set):
            if isinstance(found, Captioned):
                check_length(found.texts, tokens)


class OfFirst:
    """Apply a transform to the image of `(image, text, row)`."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, sample: tuple[Any, str, int]) -> tuple[Tensor, str, int]:
        """Return the transformed sample."""
        return self.transform(sample[0]), *sample[1:]


def collate(samples: Sequence[tuple[Tensor, str, int]]) -> tuple[Tensor, list[str], Tensor]:
    """Images [B, 3, S, S], texts and rows [B]."""
    images, texts, rows = zip(*samples)
    return torch.stack(images), list(texts), torch.tensor(rows)
