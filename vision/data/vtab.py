"""VTAB-1k as it lies on disk: file lists with 800 + 200 training images and the whole test set, for 19 tasks."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Unpack

from rich.progress import track

from mmpeft.data.contract import Resize
from mmpeft.data.files import WORTH_A_BAR, ImageFiles
from mmpeft.data.images import ImageData, Renamed, check_label_column
from mmpeft.data.options import Augment, LoadingOptions, SizeOptions
from mmpeft.data.texts import cleaned, read_text
from mmpeft.errors import ConfigError, DataError, nearest

LOG = logging.getLogger(__name__)
Subset = Literal["train800", "train800val200"]

# task: (group, classes, whether the original pictures are lossless)
TASKS: dict[str, tuple[str, int, bool]] = {
    "cifar": ("natural", 100, True),
    "caltech101": ("natural", 102, False),
    "dtd": ("natural", 47, False),
    "oxford_flowers102": ("natural", 102, False),
    "oxford_iiit_pet": ("natural", 37, False),
    "svhn": ("natural", 10, True),
    "sun397": ("natural", 397, False),
    "patch_camelyon": ("specialized", 2, True),
    "eurosat": ("specialized", 10, False),
    "resisc45": ("specialized", 45, False),
    "diabetic_retinopathy": ("specialized", 5, False),
    "clevr_count": ("structured", 8, True),
    "clevr_dist": ("structured", 6, True),
    "dmlab": ("structured", 6, False),
    "kitti": ("structured", 4, True),
    "dsprites_loc": ("structured", 16, True),
    "dsprites_ori": ("structured", 16, True),
    "smallnorb_azi": ("structured", 18, True),
    "smallnorb_ele": ("structured", 9, True),
}
GROUPS = ("natural", "specialized", "structured")
ALIASES: dict[str, tuple[str, ...]] = {
    "cifar": ("cifar100", "cifar_100"),
    "caltech101": ("caltech_101",),
    "oxford_flowers102": ("flowers102", "oxford_flowers", "flowers"),
    "oxford_iiit_pet": ("oxford_pet", "oxford_pets", "pets", "pet"),
    "patch_camelyon": ("camelyon", "pcam"),
    "diabetic_retinopathy": ("retinopathy",),
    "clevr_count": ("clevr_count_all",),
    "clevr_dist": ("clevr_distance", "clevr_closest_object_distance"),
    "kitti": ("kitti_distance", "kitti_dist"),
    "dsprites_loc": ("dsprites_location", "dsprites_label_x_position", "dsprites_xpos"),
    "dsprites_ori": ("dsprites_orientation", "dsprites_label_orientation", "dsprites_orient"),
    "smallnorb_azi": ("smallnorb_azimuth", "smallnorb_label_azimuth", "snorb_azim"),
    "smallnorb_ele": ("smallnorb_elevation", "smallnorb_label_elevation", "snorb_elev"),
}
_TASK_OF = {alias: task for task, aliases in ALIASES.items() for alias in aliases} | {task: task for task in TASKS}


def vtab_task(name: str) -> str:
    """Return the task's own name for any of its names.

    Raises:
        ConfigError: no task has that name.
    """
    key = name.strip().lower().replace("-", "_")
    if key not in _TASK_OF:
        raise ConfigError(f"there is no VTAB task {name!r}.{nearest(key, _TASK_OF)} The tasks: {', '.join(TASKS)}")
    return _TASK_OF[key]


class VTABOptions(LoadingOptions, SizeOptions, total=False):
    """Options of `ImageData`, but for `augment` and `resize`."""


class VTABData(ImageData):
    """One VTAB-1k task: lists `{train800,val200,train800val200,test}.txt` with lines `images/<split>/000000.jpg 12`.

    `train800` validates on val200, for choosing; `train800val200` trains on all 1000 and has no validation set, because
    the only images left are the test's. Images are resized without a crop and, by default, not augmented.
    """

    def __init__(
        self,
        root: str,
        task: str,
        subset: Subset = "train800",
        augment: Augment = "none",
        resize: Resize | None = "squash",
        **options: Unpack[VTABOptions],
    ) -> None:
        """
        Args:
            root: the folder that holds the tasks' folders.
            task: one of the 19 tasks, under any of its names (`cifar`, `cifar100`, `pets` …).
            subset: what to train on, `train800` (validation on val200) or `train800val200` (no validation).
            augment: the benchmark has `none`.
            resize: the benchmark has `squash`, whatever the backbone was evaluated with.
            options: those of `ImageData`.

        Raises:
            ConfigError: the task or the subset is unknown.
            DataError: the task's folder is missing.
        """
        super().__init__(augment=augment, resize=resize, **options)
        if subset not in ("train800", "train800val200"):
            raise ConfigError(f"subset is train800 or train800val200, got {subset!r}")
        self.task, self.subset = vtab_task(task), subset
        self.group, count, self.lossless = TASKS[self.task]
        names = [self.task, *ALIASES.get(self.task, ())]
        spelt = [name.replace("_", "-") for name in names if "_" in name]
        self.folder = next((Path(root, name) for name in (*names, *spelt) if Path(root, name).is_dir()), Path(root))
        if not (self.folder / "test.txt").is_file():
            raise DataError(
                f"{root} has no folder of VTAB task {self.task!r} with its list test.txt; looked for {', '.join(names)}"
            )
        self.classes = [str(label) for label in range(count)]

    def datasets(self, stage: str | None = None) -> None:
        """Read the lists the stage needs; check paths and labels, and warn of JPEG copies and duplicates.

        Raises:
            DataError: a list, a line, a label or an image file is wrong.
        """
        if stage in ("fit", "validate", None):
            train = self.read(self.subset)
            self.train_set = train
            self.val_set = self.read("val200") if self.subset == "train800" else None
            self._warn_jpeg(train)
            if isinstance(self.val_set, ImageFiles):
                self._warn_duplicates("val200", train, self.val_set)
        if stage in ("test", "predict", None):
            test = self.read("test")
            self.test_set, self.predict_set = test, Renamed(test, test.paths.__getitem__)
            if stage != "predict" and (self.folder / f"{self.subset}.txt").is_file():
                self._warn_duplicates("test", self.read(self.subset), test)

    def read(self, split: str) -> ImageFiles:
        """Read one list: the images and labels of `train800`, `val200`, `train800val200` or `test`."""
        path = self.folder / f"{split}.txt"
        lines = cleaned(read_text(path)).splitlines()
        numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
        paths, words = [], []
        for number in numbers:
            parts = lines[number - 1].rsplit(maxsplit=1)
            if len(parts) != 2:
                raise DataError(f"{path}:{number}: expected `<image> <label>`, got {lines[number - 1]!r}")
            paths.append(str(self.folder / parts[0]))
            words.append(int(parts[1]) if parts[1].lstrip("-").isdecimal() else parts[1])
        if not paths:
            raise DataError(f"the list {path} is empty; restore it")
        count = self.num_classes
        remedy = f"{self.task} has {count} classes, numbered from 0: is this the list of another task?"
        labels = check_label_column(words, count, lambda row: f"{path}:{numbers[row]}", remedy)
        lost = [row for row, file in enumerate(paths) if not os.path.isfile(file)]
        if lost:
            raise DataError(
                f"{path}:{numbers[lost[0]]}: {len(lost)} of {len(paths)} images are missing, first {paths[lost[0]]}"
            )
        return ImageFiles(paths, labels)

    def _warn_jpeg(self, train: ImageFiles) -> None:
        if self.lossless:
            copies = sum(_head(path) == b"\xff\xd8" for path in train.paths)
            if copies:
                LOG.warning(
                    "%d of %d training images of %s are JPEG, but the originals are lossless: this is a "
                    "re-encoded copy, and its results are not comparable (about 10 points lower on CIFAR)",
                    copies, len(train), self.task,
                )  # fmt: skip

    def _warn_duplicates(self, split: str, train: ImageFiles, other: ImageFiles) -> None:
        count = duplicates(train.paths, other.paths)
        if count:
            LOG.warning("%d of %d %s images of %s are also in %s", count, len(other), split, self.task, self.subset)


def duplicates(known: Sequence[str], others: Sequence[str]) -> int:
    """Count the files of `others` whose bytes equal those of a known file; only files of equal size are read."""
    sizes: dict[int, set[bytes]] = defaultdict(set)
    for path in known:
        sizes[os.path.getsize(path)].add(_hash(path))
    shown = track(others, "Looking for duplicates", disable=len(others) < WORTH_A_BAR, transient=True)
    found = ((path, os.path.getsize(path)) for path in shown)
    return sum(size in sizes and _hash(path) in sizes[size] for path, size in found)


def vtab_averages(results: Mapping[str, float]) -> dict[str, float]:
    """Average task accuracies, each average under the name of what it is.

    Args:
        results: task, under any of its names, to accuracy (all in percent, or all as shares).

    Returns:
        The mean of every complete group; `group`, the mean of the three group means, and `mean19`, the mean over
        tasks, when all 19 are there; else `mean<n>` over the n tasks that are. `group` and `mean19` differ by
        2 to 6 points.

    Raises:
        ConfigError: a task is unknown or given twice, an accuracy is not finite, or there are no results.
    """
    found: dict[str, float] = {}
    for name, accuracy in results.items():
        task = vtab_task(name)
        if task in found:
            raise ConfigError(f"VTAB task {task!r} is given twice, the second time as {name!r}")
        if not math.isfinite(accuracy):
            raise ConfigError(f"the accuracy of VTAB task {name!r} is {accuracy}; leave tasks without a result out")
        found[task] = float(accuracy)
    if not found:
        raise ConfigError("there are no VTAB results to average")
    out: dict[str, float] = {}
    for group in GROUPS:
        tasks = [task for task, (own, _, _) in TASKS.items() if own == group]
        if all(task in found for task in tasks):
            out[group] = sum(found[task] for task in tasks) / len(tasks)
    if len(out) == len(GROUPS):
        out["group"] = sum(out.values()) / len(GROUPS)
    out[f"mean{len(found)}"] = sum(found.values()) / len(found)
    return out


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


def _hash(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
