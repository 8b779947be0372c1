"""A data module as a sequence of tasks over disjoint classes, and emoji by subcategory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.images import ImageData, Pairs
from mmpeft.data.options import UnbatchedImageOptions
from mmpeft.data.sampling import EpochSampler, ResumableLoader, Seeded, SizedDataset
from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError, DataError


@dataclass(frozen=True)
class SequenceTask:
    """One step of a sequence: its number, its classes `start:stop` in the order of arrival, and how many steps."""

    number: int
    start: int
    stop: int
    total: int

    @property
    def classes(self) -> range:
        """Labels that are new."""
        return range(self.start, self.stop)


def split(classes: int, initial: int, increment: int) -> list[SequenceTask]:
    """`initial` classes first, then `increment` at a time, the last task with what is left.

    Raises:
        ConfigError: a task would have no class, or the first more than there are.
    """
    if not 1 <= initial <= classes or increment < 1:
        raise ConfigError(
            f"a sequence over {classes} classes needs 1 <= initial <= {classes} and increment >= 1, "
            f"got initial={initial}, increment={increment}"
        )
    starts = [0, *range(initial, classes, increment)]
    stops = [*starts[1:], classes]
    return [SequenceTask(i, start, stop, len(starts)) for i, (start, stop) in enumerate(zip(starts, stops))]


class Slice:
    """Some samples of a labelled set, labels renamed."""

    def __init__(self, dataset: SizedDataset, rows: Sequence[int], rename: Sequence[int]) -> None:
        self.dataset, self.rows, self.rename = dataset, list(rows), list(rename)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return one image and its label in the order of arrival."""
        image, label = self.dataset[self.rows[index]]
        return image, self.rename[int(label)]


class TaskSequence:
    """Training and test batches of each task; labels count classes in the order in which they arrive.

    The order is that of the data, or with `order` the permutation of numpy's legacy generator with that seed, as in
    the literature (1993).
    """

    def __init__(self, data: ImageData, initial: int, increment: int, order: int | None = None) -> None:
        data.setup()
        if data.train_set is None or data.test_set is None:
            raise DataError(f"{type(data).__name__} has no training or no test set")
        self.data, count = data, data.num_classes
        self.tasks = split(count, initial, increment)
        arrival = list(range(count)) if order is None else np.random.RandomState(order).permutation(count).tolist()
        self.classes = [data.classes[c] for c in arrival]
        self.rename = [arrival.index(c) for c in range(count)]
        self.sets = {"train": data.train_set, "test": data.test_set}
        self.labels = {name: self._labels(found, name) for name, found in self.sets.items()}

    def _labels(self, dataset: SizedDataset, name: str) -> Tensor:
        """Labels in the order of arrival.

        Raises:
            DataError: a label is out of range, or a class has no sample.
        """
        known = getattr(dataset, "second", None)
        labels = known if isinstance(known, Tensor) else torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
        count = len(self.rename)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise DataError(f"labels of the {name} set must lie in 0 … {count - 1}, got {int(labels.max())}")
        found = torch.tensor(self.rename)[labels] if len(labels) else labels
        empty = [self.classes[c] for c in range(count) if not (found == c).any()]
        if empty:
            raise DataError(f"no {name} samples of {', '.join(empty[:5])}: a task would be empty")
        return found

    def rows(self, name: str, classes: range) -> list[int]:
        """Samples of a range of classes."""
        labels = self.labels[name]
        return torch.nonzero((labels >= classes.start) & (labels < classes.stop)).flatten().tolist()

    def training(self, classes: range) -> ResumableLoader:
        """Shuffled, augmented batches."""
        return self._loader("train", classes, self.data.train_transform, self.data.batch_size, shuffle=True)

    def plain(self, classes: range) -> ResumableLoader:
        """The same samples once, in order and as they are evaluated: for statistics."""
        return self._loader("train", classes, self.data.eval_transform, self.data.eval_batch_size)

    def testing(self, classes: range) -> ResumableLoader:
        """Test batches."""
        return self._loader("test", classes, self.data.eval_transform, self.data.eval_batch_size)

    def _loader(
        self, name: str, classes: range, transform: Callable[[Any], Any] | None, batch: int, shuffle: bool = False
    ) -> ResumableLoader:
        own = Slice(self.sets[name], self.rows(name, classes), self.rename)
        return ResumableLoader(
            Seeded(own, transform, self.data.seed),
            batch_size=batch,
            sampler=EpochSampler(len(own), shuffle=shuffle, seed=self.data.seed),
            num_workers=self.data.num_workers,
            generator=torch.Generator().manual_seed(self.data.seed),
        )


class EmojiKinds(ImageData):
    """Emoji of one drawing style by subcategory (animal-mammal, sky & weather, …), those with enough drawings.

    With `least=16` and `least_test=5` there are 20 of OpenMoji. At most `most` training and `most_test` test drawings
    of each, the first by code point.
    """

    paper = 255

    small_batch = 256

    def __init__(
        self,
        style: str = "openmoji",
        least: int = 16,
        least_test: int = 5,
        most: int = 40,
        most_test: int = 20,
        batch_size: int = 32,
        **options: Unpack[UnbatchedImageOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        if not (1 <= least <= most and 1 <= least_test <= most_test):
            raise ConfigError(f"expected 1 <= least <= most, got {least}, {most} and {least_test}, {most_test}")
        self.style, self.most, self.most_test = style, most, most_test
        sets = emoji(style, "train"), emoji(style, "test")
        counts = [torch.bincount(found.sublabels, minlength=len(found.subcategories)) for found in sets]
        self.kept = torch.nonzero((counts[0] >= least) & (counts[1] >= least_test)).flatten().tolist()
        if not self.kept:
            raise DataError(f"no subcategory has {least} training and {least_test} test drawings")
        self.classes = [sets[0].subcategories[kind] for kind in self.kept]

    def datasets(self, stage: str | None = None) -> None:
        """Set the training and the test set."""
        for name, most in (("train", self.most), ("test", self.most_test)):
            found = emoji(self.style, name)
            rows = [torch.nonzero(found.sublabels == kind).flatten()[:most] for kind in self.kept]
            labels = torch.cat([torch.full((len(own),), i) for i, own in enumerate(rows)])
            setattr(self, f"{name}_set", Pairs(found.rgb()[torch.cat(rows)], labels))
