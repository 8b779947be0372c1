"""Image data sets of Hugging Face `datasets`: from the hub, a saved folder, parquet files, or a folder of images."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import datasets as hf
import pyarrow.parquet as pq
from PIL import Image

from mmpeft.data.caption_sources import image_bytes
from mmpeft.data.captioned import listed
from mmpeft.data.images import ImageData, Renamed, check_label_column
from mmpeft.data.options import ImageOptions
from mmpeft.data.pictures import decoded
from mmpeft.data.sampling import hash_seed
from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.types import Json, Leaf, Untyped

LOG = logging.getLogger(__name__)
VAL = ("validation", "val", "valid", "dev")
LABELS = ("label", "labels", "fine_label", "class", "target", "category")
IMAGES = ("image", "img", "images", "picture")


class HubData(ImageData):
    """One image column and one label column of a data set; where it has no validation split, one is cut from train."""

    def __init__(
        self,
        path: str,
        name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        **options: Unpack[ImageOptions],
    ) -> None:
        """
        Args:
            path: a name on the hub, a folder written by `save_to_disk`, a parquet file or a folder of them, or of
                images.
            name: the configuration, where a data set has several.
            image_column: None for the only column of images.
            label_column: None for the only class label, or a column with a usual name (`label`, `fine_label` …).
            train_split: the split to train on.
            val_split: the split to validate on; None for `validation` if there is one.
            test_split: the split to test on; None for `test` if there is one.
            val_fraction: share of the training rows for validation where there is no split for it.
            options: those of `ImageData`.

        Raises:
            ConfigError: `val_fraction` is out of range.
        """
        super().__init__(**options)
        if not 0 <= val_fraction < 1:
            raise ConfigError(f"val_fraction is a share in [0, 1), got {val_fraction}")
        self.path, self.name, self.val_fraction = path, name, val_fraction
        self.image_column, self.label_column = image_column, label_column
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self._tables: dict[str, Untyped] = {}

    def datasets(self, stage: str | None = None) -> None:
        """Load the data set once; check columns, and the labels of the splits that the stage needs.

        Labels of a split that is only predicted are not looked at: a test split may have none.

        Raises:
            DataError: the data set, a split or a column is missing, or a label is no class.
        """
        if not self._tables:
            self._tables = self._open()
        tables = self._tables
        columns = tables["train"].column_names
        image = self._column("image_column", self.image_column, columns, _image_columns(tables["train"]))
        label = self._column("label_column", self.label_column, columns, _label_columns(tables["train"]))
        train = _values(tables["train"], label)
        self.classes, known = _classes(tables["train"].features[label], train, f"{self.path}, column {label!r}")

        def labelled(role: str) -> HubRows:
            where = f"{self.path}, split {self.splits[role]!r}, column {label!r}"
            values = train if role == "train" else _values(tables[role], label)
            names, own = _names(tables[role], label), {name: number for number, name in enumerate(self.classes)}
            if role != "train" and names is not None:  # numbers of another split's list mean that list's names
                values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]
                return HubRows(tables[role], image, _numbered(values, own, len(self.classes), where), where)
            by_name = known or (own if _are_texts(values) else None)
            return HubRows(tables[role], image, _numbered(values, by_name, len(self.classes), where), where)

        if self.train_set is None:
            rows = labelled("train")
            if "val" not in tables and self.val_fraction:
                order = sorted(range(len(rows)), key=lambda row: hash_seed(row))
                cut = round(self.val_fraction * len(order))
                whole = rows
                self.val_set, rows = rows.take(sorted(order[:cut])), rows.take(sorted(order[cut:]))
                lost = sorted({self.classes[label] for label in set(whole.labels) - set(rows.labels)})
                if lost:
                    raise DataError(
                        f"val_fraction={self.val_fraction} takes all training rows of {listed(lost)}: none is left to "
                        "train on; add rows, leave the classes out, or lower val_fraction"
                    )
            present = set(rows.labels)
            absent = [name for number, name in enumerate(self.classes) if number not in present]
            if absent:
                LOG.warning("%s has no training row of %d of its classes: %s", self.path, len(absent), listed(absent))
            self.train_set = rows
        if stage in ("fit", "validate", None) and "val" in tables and self.val_set is None:
            self.val_set = labelled("val")
        if stage in ("test", None) and "test" in tables and self.test_set is None:
            self.test_set = labelled("test")
        if stage in ("predict", None):
            role = "test" if "test" in tables else "val"
            plain = self.val_set
            if role in tables:
                plain = HubRows(
                    tables[role], image, [0] * len(tables[role]), f"{self.path}, split {self.splits[role]!r}"
                )
            self.predict_set = Renamed(plain, plain.name) if isinstance(plain, HubRows) else None

    def _open(self) -> dict[str, Untyped]:
        """The splits in use as `datasets.Dataset`, and their names in `self.splits`."""
        try:
            found = _load(self.path, self.name)
        except Exception as error:  # `datasets` raises its own, the hub's, pyarrow's and the file system's
            first = str(error).splitlines()[0] if str(error) else ""
            raise DataError(
                f"the data set {self.path!r} cannot be loaded ({type(error).__name__}: {first}); check the name, the "
                "configuration `name`, and that the hub can be reached, or give a local folder or parquet file"
            ) from error
        splits: dict[Any, Any] = {self.splits["train"]: found} if isinstance(found, hf.Dataset) else dict(found)
        usual = {"train": (), "val": VAL, "test": ("test",)}
        tables: dict[str, Untyped] = {}
        for role, wanted in self.splits.items():
            name = wanted or next((name for name in usual[role] if name in splits), None)
            if name is None:
                continue
            if name not in splits:
                raise DataError(
                    f"{self.path!r} has no split {name!r}; its splits: {', '.join(splits)}.{nearest(name, splits)} "
                    f"Set {role}_split"
                )
            tables[role], self.splits[role] = splits[name], name
        return tables

    def _column(self, option: str, given: str | None, columns: Sequence[str], fit: Sequence[str]) -> str:
        if given is not None and given not in columns:
            raise DataError(
                f"{self.path!r} has no column {given!r}; its columns: {', '.join(columns)}.{nearest(given, columns)}"
            )
        if given is None and len(fit) != 1:
            what = "none is" if not fit else f"{' and '.join(fit)} are"
            raise DataError(
                f"give {option}: of the columns of {self.path!r} ({', '.join(columns)}), {what} recognised as such"
            )
        return given or fit[0]


class HubRows:
    """Samples `(RGB image, label)` of a table, decoded when asked for."""

    def __init__(self, table: Untyped, image: str, labels: Sequence[int], where: str) -> None:
        try:
            self.table: Untyped = table.cast_column(image, hf.Image(decode=False))
        except Exception as error:  # pyarrow has many
            raise DataError(f"{where}: the column {image!r} holds {table.features[image]}, not images") from error
        self.image, self.labels, self.where = image, list(labels), where
        self.numbers = list(range(len(self.labels)))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return one image and its label.

        Raises:
            DataError: the image is missing or damaged.
        """
        where = f"{self.where}: the image of {self.name(index)}"
        return decoded(image_bytes(self.table[self.numbers[index]][self.image], where), where), self.labels[index]

    def name(self, index: int) -> str:
        """Return the identifier of a row: its number in the split it came from."""
        return f"row {self.numbers[index]}"

    def take(self, rows: Sequence[int]) -> HubRows:
        """Return a subset of the rows."""
        other = HubRows(self.table, self.image, [self.labels[row] for row in rows], self.where)
        other.numbers = [self.numbers[row] for row in rows]
        return other


def _load(path: str, name: str | None) -> Untyped:
    """A `Dataset` or `DatasetDict` from wherever `path` points."""
    local = Path(path)
    if local.is_dir() and ((local / "dataset_dict.json").is_file() or (local / "state.json").is_file()):
        return hf.load_from_disk(path)
    if local.is_file():
        return hf.load_dataset("parquet", name, data_files={"train": str(local)})
    parquet = sorted(local.glob("*.parquet")) or sorted(local.glob("data/*.parquet")) if local.is_dir() else []
    if parquet:
        files: dict[str, list[str]] = {}
        for file in parquet:  # train-00000-of-00002.parquet, test.parquet
            files.setdefault(file.stem.split("-")[0], []).append(str(file))
        # each by itself: read together, all would get the first one's list of class names
        return {split: _one_split(split, own, name) for split, own in files.items()}
    return hf.load_dataset("imagefolder", name, data_dir=path) if local.is_dir() else hf.load_dataset(path, name)


def _one_split(split: str, files: Sequence[str], name: str | None) -> Untyped:
    """One split from its parquet files, which must agree on the names of classes."""
    known = {json.dumps(_class_names(file), sort_keys=True): file for file in files}
    if len(known) > 1:
        raise DataError(f"{' and '.join(list(known.values())[:2])} list their classes in different orders")
    return hf.load_dataset("parquet", name, data_files={split: list(files)}, split=split)


def _class_names(file: str) -> Json:
    """The names of classes by column, as `datasets` has written them into a parquet file."""
    written = (pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(written).get("info", {}).get("features", {})
    return {name: f["names"] for name, f in features.items() if isinstance(f, dict) and "names" in f}


def _names(table: Untyped, column: str) -> list[str] | None:
    """The names that a column's numbers stand for."""
    feature = table.features.get(column)
    return list(feature.names) if isinstance(feature, hf.ClassLabel) else None


def _are_texts(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _image_columns(table: Untyped) -> list[str]:
    features = table.features
    typed = [name for name, feature in features.items() if isinstance(feature, hf.Image)]
    encoded = [name for name, f in features.items() if isinstance(f, dict) and {"bytes", "path"} <= f.keys()]
    usual = [name for name in IMAGES if name in features]
    return typed or encoded or usual[:1]


def _label_columns(table: Untyped) -> list[str]:
    features = table.features
    typed = [name for name, feature in features.items() if isinstance(feature, hf.ClassLabel)]
    return (
        typed if len(typed) == 1 else [name for name in LABELS if name in features and (not typed or name in typed)][:1]
    )


def _values(table: Untyped, column: str) -> list[object]:
    return list(table.select_columns([column]).with_format(None)[column][:])


def _classes(feature: Untyped, values: Sequence[object], where: str) -> tuple[list[str], dict[str, int] | None]:
    """Class names, and the number of each for labels that are text."""
    if isinstance(feature, hf.ClassLabel):
        return list(feature.names), None
    names = sorted({value for value in values if isinstance(value, str)})
    if names:
        return names, {name: number for number, name in enumerate(names)}
    whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if not whole:
        raise DataError(f"{where}: expected whole numbers, text or a ClassLabel, got {feature}; set label_column")
    if max(whole) >= len(values):
        raise DataError(
            f"{where}: label {max(whole)} in {len(values)} rows: these are no class numbers; set label_column"
        )
    return [str(number) for number in range(max(whole) + 1)], None


def _numbered(values: Sequence[Leaf], known: dict[str, int] | None, classes: int, where: str) -> list[int]:
    """Labels as integers in [0, classes), checked."""
    if known is not None:
        lost = next((row for row, value in enumerate(values) if value not in known), None)
        if lost is not None:
            raise DataError(
                f"{where}, row {lost}: {values[lost]!r} is none of the {classes} classes of train"
                f"{nearest(str(values[lost]), known)}; repair or remove the row"
            )
        return [known[value] for value in values]
    return check_label_column(values, classes, lambda row: f"{where}, row {row}", "repair or remove the row")
