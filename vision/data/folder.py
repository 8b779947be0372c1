"""Your own images, one folder a class."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from mmpeft.data.captioned import listed
from mmpeft.data.files import ImageFiles, readable
from mmpeft.data.folders import Search, identity, mentions_split, pictures_in, split_folders, subfolders
from mmpeft.data.images import ImageData, Renamed
from mmpeft.data.inputs import picture_files
from mmpeft.data.options import ImageOptions
from mmpeft.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)
Samples = list[tuple[Path, int]]


class FolderData(ImageData):
    """Images in `root/train/<class>/…`, `root/val/<class>/…`, `root/test/<class>/…`, or in `root/<class>/…`.

    Splits are known by usual names, however they are written: `Training`, `seg_test`, `eval`. What the folders do not
    split is split here, within each class, by a hash of the file's path in its class: fixed, the same on every machine
    and not dependent on `seed`. Each file counts once; what is left out is counted in a warning.
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        skip_unreadable: bool = False,
        predict: str | list[str] | None = None,
        splits: dict[str, str] | None = None,
        **options: Unpack[ImageOptions],
    ) -> None:
        """
        Args:
            root: the folder that holds `train`, `val`, `test`, or the classes themselves.
            val_fraction: share of each class for validation where there is no folder `val`.
            test_fraction: share of each class for the test where there is no folder `train`.
            skip_unreadable: leave broken image files out, with a warning, where the default is to refuse them.
            predict: files and folders to predict; None for the test images.
            splits: folders in `root` by split, such as `{train: Images, test: Held}`; `{}` says that all folders are
                classes, also one that is called `train`; None to go by their names.
            options: those of `ImageData`.

        Raises:
            ConfigError: a fraction is out of range, or a split's folder is not there.
            DataError: the folder is missing, holds no class folders, or may be read in two ways. `setup` checks the
                images.
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
        self.folders = layout(self.root, splits)
        base = self.folders.get("train", self.root)
        self.classes = [_named(folder) for folder in subfolders(base)]
        if not self.classes:
            raise DataError(
                f"{base} has no class folders; expected {self.root}/train/<class>/*.jpg or {self.root}/<class>/*.jpg"
                + (f"; splits: {{}} says that {base.name} is a class itself" if self.folders else "")
            )
        if len(self.classes) == 1 and split_folders(base / self.classes[0]):
            raise DataError(f"{base} holds {self.classes[0]!r} alone, which has the splits: give that folder as root")
        self._samples: dict[str, Samples] = {}

    def datasets(self, stage: str | None = None) -> None:
        """Find, check and split the files once; then set the sets that the stage needs.

        Raises:
            DataError: a class folder is empty, a split has a class that train lacks, a class is left without training
                images, a file is in two classes, or one cannot be read.
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

    def _split(self) -> dict[str, Samples]:
        base = self.folders.get("train", self.root)
        found = self._scan(base)
        out: dict[str, Samples] = {"train": [], "val": [], "test": []}
        shares = {"test": self.test_fraction if base == self.root else 0.0, "val": self.val_fraction}
        for split in ("val", "test"):
            if split in self.folders:
                shares[split] = 0.0
                out[split] = self._scan(self.folders[split])
        own: dict[int, Samples] = defaultdict(list)
        for sample in found:
            own[sample[1]].append(sample)
        folders = {_named(folder): folder for folder in subfolders(base)}
        for label, samples in own.items():
            inside = folders[self.classes[label]]
            samples.sort(key=lambda sample: hashlib.sha256(sample[0].relative_to(inside).as_posix().encode()).digest())
            first = round(shares["test"] * len(samples))
            second = first + round(shares["val"] * len(samples))
            out["test"] += samples[:first]
            out["val"] += samples[first:second]
            out["train"] += samples[second:]
            if not samples[second:]:
                raise DataError(
                    f"class {self.classes[label]!r} has {len(samples)} images, all of which go to validation and test: "
                    "none is left to train on; add images, leave the class out, or lower val_fraction and test_fraction"
                )
        _warn_shared(out)
        return {split: sorted(samples) for split, samples in out.items()}

    def _scan(self, folder: Path) -> Samples:
        """The readable images of all class folders in a split."""
        named = {_named(child): child for child in subfolders(folder)}
        unknown = sorted(named.keys() - set(self.classes))
        if unknown:
            raise DataError(
                f"{folder} has classes that the training images lack: {', '.join(unknown)}; "
                f"train has {', '.join(self.classes)}"
            )
        search = Search()
        files = {name: search.below(child) for name, child in named.items()}
        search.beside_folders(folder)
        search.tell(folder)
        empty = [name for name, paths in files.items() if not paths]
        if empty:
            raise DataError(
                f"class folders without images in {folder}: {', '.join(empty)}; remove them or add images"
                + (f" (left out: {search.listed()})" if search.left else "")
            )
        owner: dict[tuple[int, int], tuple[str, Path]] = {}
        for name, paths in files.items():
            for path in paths:
                first, other = owner.setdefault(identity(path), (name, path))
                if first != name:
                    raise DataError(f"{other} and {path} are one file in two classes; remove one of them")
        good = set(readable([path for paths in files.values() for path in paths], self.skip_unreadable))
        bare = [name for name, paths in files.items() if good.isdisjoint(paths)]
        if bare:
            raise DataError(
                f"no image can be read in the class folders {', '.join(bare)} of {folder}; repair or remove them"
            )
        return [(path, self.classes.index(name)) for name, paths in files.items() for path in paths if path in good]

    def _to_predict(self, inputs: Sequence[str]) -> ImageFiles:
        paths = picture_files(inputs, self.skip_unreadable)
        return ImageFiles(paths, [str(path) for path in paths])


def layout(root: Path, given: Mapping[str, str] | None) -> dict[str, Path]:
    """The folders of the splits; none if the folders in `root` are classes.

    Raises:
        DataError: both may be meant.
    """
    splits = split_folders(root, given)
    inside = subfolders(root)
    if given is None and not splits:
        _check_classes(root, inside)
    if given is None and splits:
        others = [child.name for child in inside if child not in _roots(splits, root)]
        direct = {role: _direct(folder) for role, folder in splits.items()}
        if others and all(direct.values()):
            return {}  # pictures lie in all of them, also in the class that is called like a split
        if others and (len(splits) == 1 or any(direct.values())):
            raise DataError(
                f"{root} has {', '.join(repr(folder.name) for folder in splits.values())}, which may be splits or "
                f"classes, beside {listed(others)}; say which: splits: {{}} if all of them are classes, else the "
                "folders, such as splits: {train: …, test: …}"
            )
        if others:
            LOG.warning("%s has train, val and test as %s; left out: the folders %s", root, splits, ", ".join(others))
    if splits and "train" not in splits:
        raise DataError(
            f"{root} has {', '.join(child.name for child in inside)}, but no folder `train`; add it, or name it: "
            "splits: {train: …}, or splits: {} if these are classes"
        )
    return splits


def _check_classes(root: Path, folders: Sequence[Path]) -> None:
    """Raise DataError where folders of no known split look like splits all the same: the same folders are in each."""
    kinds = [{_named(child) for child in subfolders(folder)} for folder in folders]
    if len(kinds) < 2 or not all(kinds) or any(map(pictures_in, folders)):
        return
    shared = set.intersection(*kinds)
    same = len(shared) > 1 and all(own == shared for own in kinds)
    if same or (shared and any(map(mentions_split, (folder.name for folder in folders)))):
        raise DataError(
            f"{root} has {listed([folder.name for folder in folders])}, and {listed(sorted(shared))} in each of them: "
            "these may be splits or classes; say which: splits: {} if they are classes, else the folders, such as "
            f"splits: {{train: {folders[-1].name}, test: {folders[0].name}}}"
        )


def _roots(splits: Mapping[str, Path], root: Path) -> set[Path]:
    """The folders directly in `root` that splits lie in."""
    return {root / folder.relative_to(root).parts[0] for folder in splits.values()}


def _direct(folder: Path) -> bool:
    """Whether pictures lie in a folder itself, and no class folders do."""
    return not subfolders(folder) and any(child.is_file() for child in folder.iterdir())


def _named(folder: Path) -> str:
    """A class by its folder's name, however its accents are encoded."""
    return unicodedata.normalize("NFC", folder.name)


def _warn_shared(samples: Mapping[str, Samples]) -> None:
    """Say which files are in two splits, so that what is measured was trained on."""
    train = {identity(path) for path, _ in samples["train"]}
    shared = [path for split in ("val", "test") for path, _ in samples[split] if identity(path) in train]
    if shared:
        LOG.warning("%d files of validation and test are also trained on: %s", len(shared), listed(shared))
