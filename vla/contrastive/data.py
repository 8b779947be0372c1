"""Images with texts for an image-text pair: a table or folder of files, tar shards, or Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.data.caption_sources import open_captions
from mmpeft.data.captioned import Captioned
from mmpeft.data.files import ImageFiles
from mmpeft.data.images import AugmentedImages
from mmpeft.data.inputs import Inputs
from mmpeft.data.options import ImageOptions
from mmpeft.errors import DataError
from mmpeft.vla.backbone import check_length


class CaptionData(AugmentedImages):
    """Images with captions, from a table, a folder, tar shards or `datasets`.

    Batches are `(images float [B, 3, S, S], texts: B strings)`; to evaluate, with their rows int64 [B] as well."""

    small_batch = 256

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        image_column: str = "image",
        text_column: str = "text",
        **options: Unpack[ImageOptions],
    ) -> None:
        """
        Args:
            train: a .csv, .tsv or .jsonl file, a folder with metadata.jsonl or a .txt beside each image, tar shards
                (`shards/train-*.tar`), or `datasets`' `<name>[:<split>]`.
            val: the same for validation.
            test: the same for the test; None for what `val` is.
            image_column: column of the images.
            text_column: column of the texts.
            options: those of `ImageData`.
        """
        super().__init__(**options)
        self.sources = {"train": train, "val": val, "test": test or val}
        self.columns = (image_column, text_column)
        self.collate = collate

    def datasets(self, stage: str | None = None) -> None:
        """Open what is named, each source once."""
        opened: dict[str, Captioned] = {}
        for name, source in self.sources.items():
            if source is not None:
                opened[source] = opened.get(source) or open_captions(source, *self.columns)
                found = copy(opened[source])
                found.by_pixels = name != "train"
                setattr(self, f"{name}_set", found)

    def take(self, inputs: Inputs) -> None:
        """Predict pictures: which of the texts fits each.

        Raises:
            DataError: there are fewer than two texts.
        """
        if len(inputs.texts) < 2:
            raise DataError("which texts may fit? mmpeft predict RUN PICTURE… --text 'a cat' 'a dog'")
        paths = inputs.pictures()
        self.predict_set = Numbered(ImageFiles(paths, [str(path) for path in paths]))

    def check_texts(self, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        """Raise DataError for a text that a tokenizer would cut."""
        for found in (self.train_set, self.val_set, self.test_set):
            if isinstance(found, Captioned):
                check_length(found.texts, tokens)


class Numbered(Dataset[tuple[Image.Image, str, int]]):
    """Pictures with their paths, and their places for rows."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, int]:
        """Return one picture, its path and its row."""
        return (*self.files[index], index)


def collate(samples: Sequence[tuple[Tensor, str, int]]) -> tuple[Tensor, list[str], Tensor]:
    """Images [B, 3, S, S], texts and rows [B]."""
    images, texts, rows = zip(*samples)
    return torch.stack(images), list(texts), torch.tensor(rows)
