"""Few-shot splits of any image classification data: base classes to learn from, new ones to be named all the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Unpack

import torch
from torch.utils.data import Subset

from mmpeft.data.images import ImageData, Renamed
from mmpeft.data.options import UnbatchedImageOptions
from mmpeft.data.sampling import SizedDataset
from mmpeft.data.texts import cleaned, read_text
from mmpeft.embedded import spoken
from mmpeft.errors import ConfigError, DataError
from mmpeft.files import may_write, write_atomic
from mmpeft.types import Json

VAL_SHOTS = 4
FORMAT = 1


class FewShotData(ImageData):
    """`shots` images a base class to train on, up to four a class to validate on, every test image of all classes.

    Classes are those of `source`, in its order; the first `base_share` of them are base classes, 0 … base − 1, and
    training holds those alone. Validation images of new classes, from the source's training set, measure what is
    forgotten; they are nobody's test. The choice for k shots is part of that for k + 1. Batches are `(images, labels)`.
    """

    small_batch = 256

    def __init__(
        self,
        source: ImageData,
        shots: int = 16,
        base_share: float = 0.5,
        split_file: str | None = None,
        batch_size: int = 32,
        **options: Unpack[UnbatchedImageOptions],
    ) -> None:
        """
        Args:
            source: the data the shots are drawn from: its training set for shots, its test set for the test.
            shots: training images of each base class.
            base_share: share of the classes, in their order, that are base classes.
            split_file: a JSON file of rows and classes: read if it is there, written if not. Whoever has it, and the
                same source, trains and tests on the same images.
            batch_size: images a training step and process.
            options: those of `ImageData`; `seed` is of the shots too.

        Raises:
            ConfigError: `base_share` leaves no base class, or another value is out of range.
            DataError: class names are not told apart, a class has fewer images than shots, or none to test on.
        """
        super().__init__(batch_size=batch_size, **options)
        if not 0 < base_share <= 1:
            raise ConfigError(f"base_share is a share of the classes in (0, 1], got {base_share}")
        if shots < 1:
            raise ConfigError(f"shots is a number of images a class >= 1, got {shots}")
        self.source, self.shots = source, shots
        self.__dict__["paper"] = source.paper  # its drawings lie on what the source's lie on
        self.split_file = None if split_file is None else Path(split_file)
        self.classes = [spoken(name) for name in source.classes]
        doubled = [name for name, count in Counter(self.classes).items() if count > 1]
        if doubled:
            raise DataError(f"several classes are called {doubled[0]!r}: a text cannot tell them apart; rename one")
        self.base = max(1, round(base_share * len(self.classes)))
        self._chosen: dict[str, list[int]] | None = None

    def datasets(self, stage: str | None = None) -> None:
        """Draw the split once, or read it, and take its rows from the source."""
        if self.train_set is not None:
            return
        self.source.setup(None)
        pool, test = self.source.train_set, self.source.test_set
        if pool is None or test is None:
            raise DataError(f"{type(self.source).__name__} has no training or no test images to draw shots from")
        rows = self._rows(pool, test)
        self.train_set = Subset(pool, rows["train"])  # type: ignore[arg-type]  # a set with a length
        self.val_set = Subset(pool, rows["val"])  # type: ignore[arg-type]  # a set with a length
        self.test_set = test
        self.predict_set = Renamed(test, str)

    def _rows(self, pool: SizedDataset, test: SizedDataset) -> dict[str, list[int]]:
        if self._chosen is None:
            facts = {"format": FORMAT, "source": type(self.source).__name__, "classes": self.classes, "base": self.base}
            labels = labels_of(pool)
            own = hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]
            facts |= {"shots": self.shots, "pool": len(pool), "labels": own}
            if self.split_file is not None and self.split_file.is_file():
                self._chosen = self._read(self.split_file, facts, labels)
            else:
                self._chosen = self._draw(labels, labels_of(test))
                if self.split_file is not None and may_write():
                    text = json.dumps({**facts, "seed": self.seed, **self._chosen}, indent=1)
                    write_atomic(self.split_file, text.encode())
        return self._chosen

    def _draw(self, labels: list[int], test: list[int]) -> dict[str, list[int]]:
        for row, name in enumerate(self.classes):
            if row not in test:
                raise DataError(f"class {name!r} has no test image; leave it out or add some")
        found = torch.tensor(labels)
        counts = torch.bincount(found, minlength=len(self.classes)).tolist()
        for name, count in zip(self.classes[: self.base], counts):
            if count < self.shots:
                raise DataError(f"class {name!r} has {count} training images, shots={self.shots}; ask for fewer shots")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        train, val = [], []
        for label in range(len(self.classes)):
            own = order[found[order] == label].tolist()
            shots = self.shots if label < self.base else 0
            train += own[:shots]
            val += own[::-1][: min(VAL_SHOTS, self.shots, len(own) - shots)]
        return {"train": train, "val": val}

    def _read(self, path: Path, facts: Json, labels: list[int]) -> dict[str, list[int]]:
        try:
            kept = json.loads(cleaned(read_text(path)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no JSON: {error}") from error
        if not isinstance(kept, dict):
            raise DataError(f"{path} is no split: expected a JSON object, got {type(kept).__name__}")
        for key, value in facts.items():
            if kept.get(key) != value:
                raise DataError(f"the split in {path} has {key}={kept.get(key)!r}, this run {value!r}")
        rows: Json = {key: kept.get(key) for key in ("train", "val")}
        for key, own in rows.items():
            if not isinstance(own, list) or not all(type(r) is int and 0 <= r < facts["pool"] for r in own):
                raise DataError(f"the split in {path} has no {key!r}, or rows outside the {facts['pool']} images there")
        if len({*rows["train"], *rows["val"]}) < len(rows["train"]) + len(rows["val"]):
            raise DataError(f"the split in {path} has an image twice; train and val share none")
        shots = Counter(labels[row] for row in rows["train"])
        if shots != dict.fromkeys(range(self.base), self.shots):
            found = {self.classes[label]: count for label, count in sorted(shots.items())}
            raise DataError(
                f"the split in {path} has training images {found}; expected {self.shots} of each of the "
                f"{self.base} base classes and no other"
            )
        return rows


def labels_of(dataset: SizedDataset) -> list[int]:
    """Labels of a set of samples `(image, label)`, without decoding images where the set keeps them apart."""
    for name in ("labels", "second", "targets"):
        found = getattr(dataset, name, None)
        if found is not None:
            return [int(label) for label in found]
    return [int(dataset[i][1]) for i in range(len(dataset))]
