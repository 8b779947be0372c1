"""Images with texts by name: files, tar shards in webdataset's layout, or Hugging Face `datasets`."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from mmpeft.data.captioned import TABLES, Captioned, folder_captions, listed, table_captions
from mmpeft.data.pictures import PICTURES, contents
from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.types import Untyped

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in its folder
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.(.+)")  # a shard's <key>.<kind>; dots may stand in the folders before it


class ShardCaptions(Captioned):
    """Tar files in webdataset's layout, `<key>.jpg` beside `<key>.txt`, read at random by where their members lie.

    A stream would have no length and no order of its own: batches could not be the same after a resumed run. Where
    there is no .txt, the text is the value of `text` in `<key>.json`.
    """

    def __init__(self, shards: Sequence[Path], text: str) -> None:
        self.texts, self.rows, self.places = [], [], list[tuple[Path, int, int]]()
        for shard in shards:
            pictures: dict[str, tuple[int, int]] = {}
            found: dict[str, str] = {}
            described: dict[str, str] = {}
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        name = MEMBER.fullmatch(member.name)
                        if name is None or not member.isfile():
                            continue
                        key, kind = name[1], f".{name[2].lower()}"
                        if kind in PICTURES:
                            if key in pictures:
                                raise DataError(f"{shard} has the image {key} twice; keep one of them")
                            pictures[key] = (member.offset_data, member.size)
                        elif kind == ".txt":
                            found[key] = _content(tar, member).decode("utf-8").strip()
                        elif kind == ".json":
                            fields = json.loads(_content(tar, member))
                            if isinstance(fields, dict) and isinstance(fields.get(text), str):
                                described[key] = fields[text]
            except (OSError, tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
                raise DataError(f"{shard} is no whole tar file of images and texts: {error}") from error
            found = {**{key: said for key, said in described.items() if key in pictures}, **found}
            alone = sorted(pictures.keys() ^ found.keys())
            if alone or not pictures:
                raise DataError(
                    f"{shard}: expected pairs <key>.jpg and <key>.txt (or .json with the field {text!r}), "
                    f"but {alone[:3] or 'there are none'}"
                )
            for key, place in pictures.items():
                self.rows.append(len(self.texts))
                self.texts.append(found[key])
                self.places.append((shard, *place))

    def data(self, index: int) -> bytes:
        shard, start, size = self.places[index]
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
        wrong = next((row for row, value in enumerate(said) if not isinstance(value, str | None)), None)
        if wrong is not None:
            raise DataError(
                f"{name}, column {text!r}, row {wrong}: expected a string, got {type(said[wrong]).__name__}; name "
                "another column, or write one text a row"
            )
        self.texts = [value or "" for value in said]
        self.rows = list(range(len(self.texts)))
        try:
            self.table: Untyped = table.cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # pyarrow has many
            raise DataError(f"{name}: the column {image!r} holds {table.features[image]}, not images") from error

    def data(self, index: int) -> bytes:
        found = self.table[index][self.image] or {}
        if found.get("bytes") is None and found.get("path") is None:
            raise DataError(f"{self.where(index)} has no image; remove the row")
        data: bytes | None = found.get("bytes")
        return contents(Path(found["path"])) if data is None else data

    def where(self, index: int) -> str:
        return f"row {index} of {self.name}, split {self.split!r}"


def _load(name: str, split: str) -> Untyped:
    import datasets

    path = Path(name)
    if any((path / file).is_file() for file in SAVED):
        found = datasets.load_from_disk(name)
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    if path.is_file():
        return datasets.load_dataset("parquet", data_files={split: name}, split=split)
    return datasets.load_dataset(name, split=split)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a file in a shard holds."""
    file = tar.extractfile(member)
    assert file is not None  # only folders have none
    return file.read()


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
    if path.suffix == ".tar":
        shards = sorted(map(Path, glob(source)))
        if not shards:
            raise DataError(f"no tar file matches {source}")
        found: Captioned = ShardCaptions(shards, text)
    elif path.suffix in TABLES:
        found = table_captions(path, image, text)
    elif path.is_file() and path.suffix != ".parquet":
        raise ConfigError(f"{source}: expected .csv, .tsv, .jsonl, .parquet or .tar, or the name of a data set")
    elif path.is_dir() and not _is_table(path):
        found = folder_captions(path, text, prompt)
    else:
        name, _, split = (source, "", "") if path.exists() else source.partition(":")
        found = HubCaptions(name, split or "train", image, text if prompt is None else None)
    if prompt is not None:
        found.texts = [prompt] * len(found)
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
