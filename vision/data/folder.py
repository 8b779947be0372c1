"""Your own images, one folder a class."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from mmpeft.data.images import ImageData, Renamed
from mmpeft.data.options import ImageOptions
from mmpeft.errors import ConfigError, DataError
from mmpeft.vision.data.files import SUFFIXES, ImageFiles, images_below, readable

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "dev")
TEST = ("test", "testing")
Samples = list[tuple[Path, int]]


class FolderData(ImageData):
    """Images in `root/train/<class>/…`, `root/val/<class>/…`, `root/test/<class>/…`, or in `root/<class>/…`.

    What the folders do not split is split here, within each class, by a hash of the file's path in its class: fixed,
    the same on every machine and not dependent on `seed`.
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        skip_unreadable: bool = False,
        predict: str | list[str] | None = None,
        **options: Unpack[ImageOptions],
    ) -> None:
        """
        Args:
            root: the folder that holds `train`, `val`, `test`, or the classes themselves.
            val_fraction: share of each class for validation where there is no folder `val`.
            test_fraction: share of each class for the test where there is no folder `train`.
            skip_unreadable: leave broken image files out, with a warning, where the default is to refuse them.
            predict: files and folders to predict; None for the test images.
            options: those of `ImageData`.

        Raises:
            ConfigError: a fraction is out of range.
            DataError: the folder is missing or holds no class folders. `setup` checks the images.
        """
        super().__init__(**options)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ConfigError(
                "val_fraction and test_fraction are shares >= 0 with a sum below 1, "
                f"got {val_fraction} and {test_fraction}"
            )
        self.root, self.val_fraction, self.test_fraction = Path(root), val_fraction, test_fraction
        self.skip_unreadable = skip_unreadable
        self.predict = [predict] if isinstance(predict, str) else predict
        if not self.root.is_dir():
            raise DataError(f"there is no folder {self.root}; `root` holds train/<class>/…, or <class>/… directly")
        self.folders = {split: self._child(names) for split, names in (("train", TRAIN), ("val", VAL), ("test", TEST))}
        self.classes = [folder.name for folder in _subfolders(self.folders["train"] or self.root)]
        if not self.folders["train"] and (self.folders["val"] or self.folders["test"]):
            raise DataError(f"{self.root} has {', '.join(self.classes)}, but no folder `train`; add it")
        if not self.classes:
            raise DataError(
                f"{self.folders['train'] or self.root} has no class folders; expected {self.root}/train/<class>/*.jpg "
                f"or {self.root}/<class>/*.jpg"
            )
        self._samples: dict[str, Samples] = {}

    def datasets(self, stage: str | None = None) -> None:
        """Find, check and split the files once; then set the sets that the stage needs.

        Raises:
            DataError: a class folder is empty, a split has a class that train lacks, or a file cannot be read.
        """
        if stage == "predict" and self.predict is not None:
            self.predict_set = self._to_predict(self.predict)
            return
        if not self._samples:
            self._samples = self._split()
        sets = {split: ImageFiles(*zip(*samples)) for split, samples in self._samples.items() if samples}
        self.train_set, self.val_set, self.test_set = (sets.get(split) for split in ("train", "val", "test"))
        shown = sets.get("test") or sets.get("val")
        if self.predict is not None:
            self.predict_set = self._to_predict(self.predict)
        elif shown is not None:
            self.predict_set = Renamed(shown, shown.paths.__getitem__)

    def _child(self, names: Sequence[str]) -> Path | None:
        return next((self.root / name for name in names if (self.root / name).is_dir()), None)

    def _split(self) -> dict[str, Samples]:
        found = self._scan(self.folders["train"] or self.root)
        out: dict[str, Samples] = {"train": [], "val": [], "test": []}
        shares = {"test": self.test_fraction if self.folders["train"] is None else 0.0, "val": self.val_fraction}
        for split in ("val", "test"):
            folder = self.folders[split]
            if folder is not None:
                shares[split] = 0.0
                out[split] = self._scan(folder)
        own: dict[int, Samples] = defaultdict(list)
        for sample in found:
            own[sample[1]].append(sample)
        for label, samples in own.items():
            base = (self.folders["train"] or self.root) / self.classes[label]
            samples.sort(key=lambda sample: hashlib.sha256(sample[0].relative_to(base).as_posix().encode()).digest())
            first = round(shares["test"] * len(samples))
            second = first + round(shares["val"] * len(samples))
            out["test"] += samples[:first]
            out["val"] += samples[first:second]
            out["train"] += samples[second:]
        return {split: sorted(samples) for split, samples in out.items()}

    def _scan(self, folder: Path) -> Samples:
        """The readable images of all class folders in a split."""
        names = [child.name for child in _subfolders(folder)]
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise DataError(
                f"{folder} has classes that the training images lack: {', '.join(unknown)}; "
                f"train has {', '.join(self.classes)}"
            )
        files = {name: images_below(folder / name) for name in names}
        empty = [name for name, paths in files.items() if not paths]
        if empty:
            raise DataError(
                f"class folders without images in {folder}: {', '.join(empty)}; remove them or add images "
                f"({', '.join(SUFFIXES)})"
            )
        good = set(readable([path for paths in files.values() for path in paths], self.skip_unreadable))
        bare = [name for name, paths in files.items() if good.isdisjoint(paths)]
        if bare:
            raise DataError(
                f"no image can be read in the class folders {', '.join(bare)} of {folder}; repair or remove them"
            )
        return [(path, self.classes.index(name)) for name, paths in files.items() for path in paths if path in good]

    def _to_predict(self, inputs: Sequence[str]) -> ImageFiles:
        paths: list[Path] = []
        for name in inputs:
            path = Path(name)
            found = images_below(path) if path.is_dir() else [path] if path.is_file() else []
            if not found:
                what = "holds no image files" if path.is_dir() else "does not exist"
                raise DataError(f"predict: {path} {what}; give image files ({', '.join(SUFFIXES)}) or folders of them")
            paths += found
        paths = readable(paths, self.skip_unreadable)
        return ImageFiles(paths, [str(path) for path in paths])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
