"""Images with texts in files: a table that names them, or a folder with metadata.jsonl or a .txt beside each."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from mmpeft.data.folders import Search
from mmpeft.data.pictures import contents, decoded
from mmpeft.data.texts import cleaned, read_text
from mmpeft.errors import DataError, nearest
from mmpeft.types import Json

TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
METADATA = ("metadata.jsonl", "metadata.csv")  # of a folder, by Hugging Face's convention
FILE_NAME = "file_name"


class Captioned:
    """Samples `(PIL image, text, row)`; samples whose images have the same pixels share their row.

    `rows` number the images as they are stored, before any is looked at.
    """

    texts: list[str]
    rows: list[int]
    by_pixels: bool = True
    """Whether rows are told by the pixels; where nobody compares them (training), those of the store are enough."""

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, int]:
        """Return one image, in RGB, with one of its texts."""
        image = decoded(self.data(index), self.where(index))
        return image, self.texts[index], row_of(image) if self.by_pixels else self.rows[index]

    def data(self, index: int) -> bytes:
        """The image of a sample as a file's content."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """What an error calls the image of a sample."""
        raise NotImplementedError


def row_of(image: Image.Image) -> int:
    """A number for an image's pixels: five captions of one image may come as five copies of it."""
    known = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
    known.update(image.tobytes())
    return int.from_bytes(known.digest()) >> 1


def texts_of(value: object) -> list[str] | None:
    """The texts in a cell: one, several in a list, or an empty one for nothing; None where it holds anything else."""
    if isinstance(value, str | None):
        return [cleaned(value or "")]
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return [cleaned(one) for one in value]
    return None


class FileCaptions(Captioned):
    """Image files and a text for each; a file may stand there several times."""

    def __init__(self, files: Sequence[Path], texts: Sequence[str]) -> None:
        self.files, self.texts = list(files), list(texts)
        known: dict[Path, int] = {}
        self.rows = [known.setdefault(file, len(known)) for file in self.files]

    def data(self, index: int) -> bytes:
        return contents(self.files[index])

    def where(self, index: int) -> str:
        return str(self.files[index])


def table_captions(table: Path, image: str, text: str) -> FileCaptions:
    """A .csv, .tsv or .jsonl file with a column of image files, relative to its folder, and one of texts.

    Raises:
        DataError: a column, a value or a file is missing.
    """
    lines = _lines(table)
    files: list[Path] = []
    texts: list[str] = []
    for number, line in enumerate(lines, 1):
        for name in (image, text):
            if name not in line:
                known = ", ".join(line) or "none"
                raise DataError(
                    f"{table}, entry {number} has no column {name!r}; columns: {known}.{nearest(name, line)}"
                )
        own = texts_of(line[text])
        for name, right in ((image, isinstance(line[image], str) and line[image]), (text, own is not None)):
            if not right:
                raise DataError(f"{table}, entry {number}: expected text in {name!r}, got {line[name]!r}")
        file = table.parent / line[image].strip()
        if not file.is_file():
            raise DataError(f"{table} names {file}, which does not exist; paths are relative to the table's folder")
        files += [file] * len(own or ())
        texts += own or ()
    return FileCaptions(files, texts)


def _lines(table: Path) -> list[Json]:
    file = io.StringIO(read_text(table).replace("\ufeff", ""), newline="")
    suffix = table.suffix.lower()
    try:
        if suffix != ".jsonl":
            return _rows(csv.DictReader(file, delimiter=TABLES[suffix]), table)
    except csv.Error as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    content = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    found = []
    for number, line in content:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{table}, line {number} is no JSON: {error}") from error
        if not isinstance(found[-1], dict):
            raise DataError(f"{table}, line {number}: expected an object {{…}}, got {line.strip()[:40]}")
    return found


def _rows(reader: csv.DictReader[str], table: Path) -> list[Json]:
    rows = list(reader)
    long = next((number for number, row in enumerate(rows, 1) if reader.restkey in row), None)
    if long is not None:
        raise DataError(f"{table}, entry {long} has more cells than columns; put texts with a separator in quotes")
    return rows


def folder_captions(folder: Path, text: str, prompt: str | None = None) -> FileCaptions:
    """Images with metadata.jsonl (or .csv; columns `file_name` and `text`), with a .txt beside each, or one prompt.

    Raises:
        DataError: there are no images or no texts, an image has none or two, or a text has no image.
    """
    search = Search((".txt", *METADATA), once=prompt is not None)
    images = search.below(folder)
    search.tell(folder)
    if not images:
        left = f" (left out: {search.listed()})" if search.left else ""
        raise DataError(f"{folder} holds no images; expected files .jpg, .png, .webp or others that Pillow reads{left}")
    if prompt is not None:
        return FileCaptions(images, [prompt] * len(images))
    beside = {path.with_suffix(""): path for path in sorted(search.companions) if path.suffix.lower() == ".txt"}
    table = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if table is not None:
        found = table_captions(table, FILE_NAME, text)
        without = sorted(set(images) - set(found.files))
        two = [file for file in found.files if file.with_suffix("") in beside]
        if two:
            raise DataError(f"{listed(two)}: texts in {table} and in a .txt beside the image; remove one of them")
        if without:
            raise DataError(f"{table} has no line for {listed(without)}; add them, or move the images away")
        return found
    stems = [path.with_suffix("") for path in images]
    if not beside.keys() & set(stems):
        deeper = next((path for name in METADATA for path in folder.glob(f"*/{name}")), None)
        raise DataError(
            f"{folder} holds {len(images)} images and no captions; expected {METADATA[0]} with lines "
            f'{{"{FILE_NAME}": "{images[0].name}", "{text}": "…"}}, or {images[0].stem}.txt beside {images[0].name}, '
            "or one prompt for all" + (f"; {deeper} is there: give {deeper.parent}" if deeper else "")
        )
    without = [path for path, stem in zip(images, stems) if stem not in beside]
    if without:
        raise DataError(f"no .txt beside {listed(without)}; write the captions, or move the images away")
    lost = [path for stem, path in beside.items() if stem not in set(stems)]
    if lost:
        raise DataError(f"no image beside {listed(lost)}; restore the images, or remove the texts")
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise DataError(f"several images share the text of {listed(twice)}; rename or remove all but one")
    return FileCaptions(images, [cleaned(read_text(beside[stem])) for stem in stems])


def listed(things: Iterable[object], most: int = 3) -> str:
    """The first of many things, and how many more there are."""
    named = [str(thing) for thing in things]
    return "; ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")
