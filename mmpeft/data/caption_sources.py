"""Images with texts by name: files, tar shards in webdataset's layout, or Hugging Face `datasets`."""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from mmpeft.data.captioned import TABLES, Captioned, folder_captions, listed, table_captions, texts_of
from mmpeft.data.folders import hidden
from mmpeft.data.pictures import MOST_BYTES, contents, suffixes
from mmpeft.data.texts import unicode
from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.types import Json, Untyped

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in its folder
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.(.+)")  # a shard's <key>.<kind>; dots may stand in the folders before it
MOST_TEXT = 2**20
LOG = logging.getLogger(__name__)


class ShardCaptions(Captioned):
    """Tar files in webdataset's layout, `<key>.jpg` beside `<key>.txt`, read at random by where their members lie.

    A stream would have no length and no order of its own: batches could not be the same after a resumed run. Where
    there is no .txt, the text is the value of `text` in `<key>.json`.
    """

    def __init__(self, shards: Sequence[Path], text: str) -> None:
        self.texts, self.rows, self.places = [], [], list[tuple[Path, int, int]]()
        kinds, left = suffixes(), Counter[str]()
        for shard in shards:
            pictures: dict[str, tuple[int, int]] = {}
            found: dict[str, list[str]] = {}
            described: dict[str, list[str]] = {}
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        if member.isdir() or any(hidden(part) for part in member.name.split("/") if part != "."):
                            continue
                        name = MEMBER.fullmatch(member.name)
                        kind = f".{name[2].lower()}" if name else "without a suffix"
                        if name is None or not member.isreg() or member.issparse():
                            left[kind if member.isreg() and not member.issparse() else "no plain file"] += 1
                        elif kind in kinds:
                            if name[1] in pictures:
                                raise DataError(f"{shard} has the image {name[1]} twice; keep one of them")
                            pictures[name[1]] = (member.offset_data, member.size)
                        elif kind == ".txt":
                            found[name[1]] = texts_of(_text(tar, member, shard)) or []
                        elif kind == ".json":
                            fields = json.loads(_text(tar, member, shard))
                            own = texts_of(fields.get(text)) if isinstance(fields, dict) else None
                            described |= {name[1]: own} if own and fields.get(text) else {}
                        else:
                            left[kind] += 1
            except DataError:
                raise
            except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
                raise DataError(f"{shard} is no whole tar file of images and texts: {error}") from error
            found = {**{key: said for key, said in described.items() if key in pictures}, **found}
            alone = sorted(pictures.keys() ^ found.keys())
            if alone or not pictures:
                raise DataError(
                    f"{shard}: expected pairs <key>.jpg and <key>.txt (or .json with the field {text!r}), "
                    f"but {alone[:3] or 'there are none'}"
                )
            first = self.rows[-1] + 1 if self.rows else 0
            for row, (key, place) in enumerate(pictures.items(), first):
                self.rows += [row] * len(found[key])
                self.texts += found[key]
                self.places += [(shard, *place)] * len(found[key])
        if left:
            said = ", ".join(f"{count} {kind}" for kind, count in left.most_common())
            LOG.warning("%d members left out of %s: %s", left.total(), listed(shards), said)

    def data(self, index: int) -> bytes:
        shard, start, size = self.places[index]
        if size > MOST_BYTES:
            raise DataError(f"{self.where(index)} has {size} bytes, expected {MOST_BYTES} at most")
        with shard.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def where(self, index: int) -> str:
        return f"sample {index} of {self.places[index][0]}"


class HubCaptions(Captioned):
    """A data set of Hugging Face `datasets`: the hub's name, parquet files, what `save_to_disk` wrote, a folder.

    Without `text` the texts are empty.
    """

    def __init__(self, name: str, split: str, image: str, text: str | None) -> None:
        import datasets

        self.name, self.split, self.image = name, split, image
        try:
            table: Untyped = _load(name, split)
        except Exception as error:  # `datasets` raises its own, the hub's, pyarrow's and the file system's
            raise DataError(f"datasets cannot load {name!r}, split {split!r}: {error}") from error
        for column in (image, *([text] if text is not None else [])):
            if column not in table.column_names:
                known = table.column_names
                raise DataError(f"{name} has no column {column!r}; columns: {known}.{nearest(column, known)}")
        said = [None] * len(table) if text is None else list(table[text])
        self.texts, self.rows = [], []
        for row, value in enumerate(said):
            own = texts_of(value)
            if own is None:
                raise DataError(
                    f"{name}, column {text!r}, row {row}: expected a string, or a list of them, got "
                    f"{type(value).__name__} {str(value)[:40]!r}; name another column"
                )
            self.texts += own
            self.rows += [row] * len(own)
        try:
            self.table: Untyped = table.cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # pyarrow has many
            raise DataError(f"{name}: the column {image!r} holds {table.features[image]}, not images") from error

    def data(self, index: int) -> bytes:
        return image_bytes(self.table[self.rows[index]][self.image], self.where(index))

    def where(self, index: int) -> str:
        return f"row {self.rows[index]} of {self.name}, split {self.split!r}"


def image_bytes(cell: Json | None, where: str) -> bytes:
    """The content of the image file in a cell of `datasets` that is not decoded.

    Raises:
        DataError: there is none.
    """
    found = cell or {}
    if found.get("bytes") is None and found.get("path") is None:
        raise DataError(f"{where} has no image; remove the row")
    data: bytes | None = found.get("bytes")
    return contents(Path(found["path"])) if data is None else data


class OnePrompt(Captioned):
    """The images of a source, each once, with one prompt for all."""

    def __init__(self, found: Captioned, prompt: str) -> None:
        self.found, first = found, {row: index for index, row in reversed(list(enumerate(found.rows)))}
        self.first = sorted(first.values())
        self.rows = [found.rows[index] for index in self.first]
        self.texts = [prompt] * len(self.rows)

    def data(self, index: int) -> bytes:
        return self.found.data(self.first[index])

    def where(self, index: int) -> str:
        return self.found.where(self.first[index])


def _load(name: str, split: str) -> Untyped:
    import datasets

    path = Path(name)
    if any((path / file).is_file() for file in SAVED):
        found = datasets.load_from_disk(name)
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    if path.is_file():
        return datasets.load_dataset("parquet", data_files={split: name}, split=split)
    return datasets.load_dataset(name, split=split)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> str:
    """The text that a file in a shard holds."""
    file = tar.extractfile(member)
    if file is None or member.size > MOST_TEXT:
        raise DataError(f"{member.name} in {shard} has {member.size} bytes, expected {MOST_TEXT} of text at most")
    return unicode(file.read(), f"{member.name} in {shard}")


def open_captions(source: str, image: str = "image", text: str = "text", prompt: str | None = None) -> Captioned:
    """The images and texts a name stands for; `prompt` is said of every image in place of its text.

    Args:
        source: a .csv, .tsv or .jsonl table, a folder of images with metadata.jsonl or a .txt beside each, tar shards
            (`shards/train-*.tar`), or `datasets`' `<name>[:<split>]` (also a .parquet file or a local folder of them).
        image: column of the images, or of their files, relative to the table.
        text: column of the texts, or field of a shard's .json.
        prompt: one text for all; None for their own.

    Raises:
        DataError: it is missing, empty or damaged. ConfigError: a file of an unknown kind.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        shards = sorted(map(Path, glob(source)))
        if not shards:
            raise DataError(f"no tar file matches {source}")
        found: Captioned = ShardCaptions(shards, text)
    elif suffix in TABLES:
        found = table_captions(path, image, text)
    elif path.is_file() and suffix != ".parquet":
        raise ConfigError(f"{source}: expected .csv, .tsv, .jsonl, .parquet or .tar, or the name of a data set")
    elif path.is_dir() and not _is_table(path):
        found = folder_captions(path, text, prompt)
    else:
        name, _, split = (source, "", "") if path.exists() else source.partition(":")
        found = HubCaptions(name, split or "train", image, text if prompt is None else None)
    if prompt is not None:
        found = OnePrompt(found, prompt)
    empty = [i for i, said in enumerate(found.texts) if not said.strip()]
    if not len(found):
        raise DataError(f"{source}: it is empty")
    if empty:
        where = listed(map(found.where, empty))
        raise DataError(f"{source}: sample {empty[0]} has no text ({where}); write one, or remove the image")
    return found


def _is_table(folder: Path) -> bool:
    """Whether a folder is a data set of its own, not one of image files."""
    return any(next(folder.glob(pattern), None) for pattern in (*SAVED, "*.parquet", "*/*.parquet"))
