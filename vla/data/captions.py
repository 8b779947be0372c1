"""Images with texts: a table of files, tar shards in webdataset's layout, or Hugging Face `datasets`."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.training.data import DataModule
from mmpeft.training.image_data import FALLBACK_MEAN, FALLBACK_SIZE, FALLBACK_STD, Augment
from mmpeft.training.transforms import evaluation, training
from mmpeft.vla.backbone import check_length

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = {".csv": ",", ".tsv": "\t"}


class Captioned:
    """Samples `(PIL image, text, row)`; samples of one image share its row."""

    texts: list[str]
    rows: list[int]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, int]:
        """Return one image with one of its texts."""
        return self.picture(index), self.texts[index], self.rows[index]

    def picture(self, index: int) -> Image.Image:
        """The image of a sample, in RGB."""
        raise NotImplementedError


class TableCaptions(Captioned):
    """A .csv or .tsv file with a column of image files, relative to its folder, and one of texts."""

    def __init__(self, table: Path, image: str, text: str) -> None:
        try:
            with table.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, delimiter=TABLES[table.suffix])
                columns = list(reader.fieldnames or ())
                lines = list(reader)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{table} cannot be read: {error}") from error
        for name in (image, text):
            if name not in columns:
                known = ", ".join(columns) or "none"
                raise DataError(f"{table} has no column {name!r}; columns: {known}.{nearest(name, columns)}")
        self.files = [table.parent / line[image] for line in lines]
        missing = next((file for file in self.files if not file.is_file()), None)
        if missing is not None:
            raise DataError(f"{table} names {missing}, which does not exist; paths are relative to the table's folder")
        self.texts = [line[text] or "" for line in lines]
        known_rows: dict[Path, int] = {}
        self.rows = [known_rows.setdefault(file, len(known_rows)) for file in self.files]

    def picture(self, index: int) -> Image.Image:
        return read(self.files[index])


class ShardCaptions(Captioned):
    """Tar files in webdataset's layout, `<key>.jpg` beside `<key>.txt`, read at random by where their members lie.

    A stream would have no length and no order of its own: batches could not be the same after a resumed run.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.texts, self.rows, self.places = [], [], list[tuple[Path, int, int]]()
        for shard in shards:
            pictures: dict[str, tuple[int, int]] = {}
            found: dict[str, str] = {}
            try:
                with tarfile.open(shard) as tar:
                    for member in tar:
                        key, dot, kind = member.name.partition(".")
                        if f"{dot}{kind.lower()}" in PICTURES:
                            pictures[key] = (member.offset_data, member.size)
                        elif kind.lower() == "txt":
                            found[key] = tar.extractfile(member).read().decode("utf-8")  # type: ignore[union-attr]
            except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
                raise DataError(f"{shard} is no whole tar file of images and texts: {error}") from error
            alone = sorted(pictures.keys() ^ found.keys())
            if alone or not pictures:
                raise DataError(f"{shard}: expected pairs <key>.jpg and <key>.txt, but {alone[:3] or 'there are none'}")
            for key, place in pictures.items():
                self.rows.append(len(self.texts))
                self.texts.append(found[key].strip())
                self.places.append((shard, *place))

    def picture(self, index: int) -> Image.Image:
        shard, start, size = self.places[index]
        with shard.open("rb") as file:
            file.seek(start)
            return decoded(file.read(size), f"sample {index} of {shard}")


class HubCaptions(Captioned):
    """A data set of Hugging Face `datasets`: the hub's name, a folder of images with metadata.jsonl, parquet files."""

    def __init__(self, name: str, split: str, image: str, text: str) -> None:
        from datasets import load_dataset

        try:
            self.table: Any = load_dataset(name, split=split)
        except Exception as error:
            raise DataError(f"datasets cannot load {name!r}, split {split!r}: {error}") from error
        for column in (image, text):
            if column not in self.table.column_names:
                known = self.table.column_names
                raise DataError(f"{name} has no column {column!r}; columns: {known}.{nearest(column, known)}")
        self.image = image
        self.texts = [str(value) for value in self.table[text]]
        self.rows = list(range(len(self.texts)))

    def picture(self, index: int) -> Image.Image:
        return on_white(self.table[index][self.image])


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
        """Args:
        train: a .csv or .tsv file, tar shards (`shards/train-*.tar`), or `datasets`' `<name>[:<split>]`.
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


def open_captions(source: str, image: str, text: str) -> Captioned:
    """The data set a name stands for.

    Raises:
        DataError: it is missing, empty or damaged. ConfigError: a file of an unknown kind.
    """
    path = Path(source)
    if path.suffix == ".tar":
        shards = sorted(map(Path, glob(source)))
        if not shards:
            raise DataError(f"no tar file matches {source}")
        found: Captioned = ShardCaptions(shards)
    elif path.suffix in TABLES:
        found = TableCaptions(path, image, text)
    elif path.is_file():
        raise ConfigError(f"{source}: expected .csv, .tsv or .tar, or the name of a data set")
    else:
        name, _, split = source.partition(":")
        found = HubCaptions(name, split or "train", image, text)
    empty = next((i for i, said in enumerate(found.texts) if not said.strip()), None)
    if empty is not None or not len(found):
        raise DataError(f"{source}: " + ("it is empty" if empty is None else f"sample {empty} has no text"))
    return found


def read(path: Path) -> Image.Image:
    """A picture file in RGB.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        return decoded(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise DataError(f"there is no picture {path}") from error


def decoded(data: bytes, where: str) -> Image.Image:
    """An image file's content in RGB.

    Raises:
        DataError: it is no image; `where` says which.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return on_white(image)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{where} cannot be read as a picture: {error}") from error


def on_white(image: Image.Image) -> Image.Image:
    """An image in RGB; what is transparent is white."""
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
