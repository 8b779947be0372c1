"""Which files of a folder are pictures, what is left out of it, and which of its folders are splits."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mmpeft.data.pictures import PLUGINS, suffixes
from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.files import kind_of

LOG = logging.getLogger(__name__)
DEBRIS = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__",
     "system volume information")
)  # fmt: skip
ROLES = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
DECORATED = re.compile(r"(?:(?:seg|images?|imgs?|data)_)?([a-z]+?)(?:_?(?:set|split|images?|imgs?|data|\d{4}))?")


def hidden(name: str) -> bool:
    """Whether a file or folder is the system's own: `.DS_Store`, `._photo.jpg`, `__MACOSX`, `Thumbs.db`."""
    return name.startswith(".") or name.casefold() in DEBRIS


class Search:
    """Pictures in folders: each file once, however often links lead to it, and a count of all that is left out."""

    def __init__(self, beside: Collection[str] = (), once: bool = True) -> None:
        """
        Args:
            beside: suffixes and names of files that belong to the pictures, and are not counted as left out.
            once: whether several names of one file count once; else only folders do.
        """
        self.beside, self.once = frozenset(beside), once
        self.left: Counter[str] = Counter()
        self.companions: list[Path] = []  # the files beside

    def below(self, folder: Path) -> list[Path]:
        """All picture files in a folder and the folders inside it, sorted; links are followed, but not upwards."""
        known = suffixes()
        above = {identity(place) for place in (folder.resolve(), *folder.resolve().parents)}
        seen: set[tuple[int, int]] = set(above)
        found: list[tuple[bool, Path]] = []
        for directory, folders, names in os.walk(folder, followlinks=True, onerror=self._closed):
            inside = []
            for name in sorted(folders):
                place = identity(Path(directory, name))
                if not hidden(name) and place not in seen:
                    seen.add(place)
                    inside.append(name)
            folders[:] = inside
            for name in names:
                path = Path(directory, name)
                reason = "" if hidden(name) else self._reason(path, known)
                if reason:
                    self.left[reason] += 1
                elif not hidden(name) and path.suffix.lower() in known:
                    found.append((path.is_symlink(), path))
        return sorted(path for path in self._distinct(path for _, path in sorted(found)))

    def beside_folders(self, folder: Path) -> None:
        """Count the pictures that lie beside the folders in a folder, where they belong to none."""
        known = suffixes()
        beside = [c for c in folder.iterdir() if c.suffix.lower() in known and not hidden(c.name) and c.is_file()]
        if beside:
            self.left["beside the class folders"] += len(beside)

    def _reason(self, path: Path, known: Collection[str]) -> str:
        """Why a file is no picture of ours; empty if it is one, or lies beside one."""
        suffix = path.suffix.lower()
        try:
            mode = path.stat().st_mode
        except OSError:
            return "link to nothing" if path.is_symlink() else "that cannot be opened"
        if suffix in self.beside or path.name in self.beside:
            self.companions.append(path)
            return ""
        if not stat.S_ISREG(mode):
            return kind_of(mode).removeprefix("a ")
        if suffix in known:
            return ""
        needs = f" (needs {PLUGINS[suffix][0]})" if suffix in PLUGINS else ""
        return f"{suffix or 'without a suffix'}{needs}"

    def _distinct(self, paths: Iterable[Path]) -> Iterable[Path]:
        seen: set[tuple[int, int]] = set()
        for path in paths:
            place = identity(path)
            if self.once and place in seen and place[1]:
                self.left["reached twice"] += 1
                continue
            seen.add(place)
            yield path

    def _closed(self, error: OSError) -> None:
        self.left["folder that cannot be opened"] += 1

    def tell(self, folder: object) -> None:
        """Say in one line what was left out, if anything was."""
        if self.left:
            LOG.warning("%d files left out of %s: %s", self.left.total(), folder, self.listed())

    def listed(self) -> str:
        """What was left out, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left.most_common())


def pictures_below(folder: Path, beside: Collection[str] = (), once: bool = True) -> list[Path]:
    """All picture files in a folder and the folders inside it, sorted; what is left out is said in one line."""
    search = Search(beside, once)
    found = search.below(folder)
    search.tell(folder)
    return found


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without the system's own."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not hidden(child.name))


def role_of(name: str) -> str | None:
    """Which split a folder's name stands for, however it is written: `Training`, `seg_test`, `val2017`, `test_set`."""
    match = DECORATED.fullmatch(re.sub(r"[-_ .]+", "_", name.casefold()).strip("_"))
    return next((role for role, names in ROLES.items() if match and match[1] in names), None)


def mentions_split(name: str) -> bool:
    """Whether one of the words in a folder's name is a split: `asl_alphabet_train`, `train-256`, `stage1_test`."""
    return any(role_of(word) for word in re.findall(r"[^\W\d_]+", name))


def pictures_in(folder: Path) -> bool:
    """Whether a picture lies in a folder itself."""
    known = suffixes()
    return any(child.suffix.lower() in known and not hidden(child.name) for child in folder.iterdir())


def split_folders(root: Path, given: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The folders of `train`, `val` and `test` in a folder, as they are named or `given`; `{}` for none.

    A folder with nothing but a folder of the same role, as archives leave it, stands for that one.

    Raises:
        ConfigError: a given name is no split or no folder.
        DataError: two folders have the same role.
    """
    if given is not None:
        for role, name in given.items():
            if role not in ROLES:
                raise ConfigError(
                    f"splits names the folders of train, val and test, got {role!r}.{nearest(role, ROLES)}"
                )
            if not (root / name).is_dir():
                known = [child.name for child in subfolders(root)]
                raise ConfigError(f"splits: {root} has no folder {name!r} for {role}.{nearest(name, known)}")
        return {role: root / name for role, name in given.items()}
    named: dict[str, list[Path]] = {}
    for child in subfolders(root):
        found = role_of(child.name)
        if found is not None:
            named.setdefault(found, []).append(child)
    two = next((same for same in named.values() if len(same) > 1), None)
    if two is not None:
        raise DataError(
            f"{root} has {' and '.join(repr(path.name) for path in two)}, and each may be {role_of(two[0].name)}; name "
            "one, such as splits: {train: …, val: …, test: …}, or say splits: {} if these are classes"
        )
    return {role: _inner(paths[0], role) for role, paths in named.items()}


def _inner(folder: Path, role: str) -> Path:
    """A split's folder, past the copy of itself that an archive has put inside."""
    shown = [child for child in folder.iterdir() if not hidden(child.name)]
    if len(shown) == 1 and shown[0].is_dir() and role_of(shown[0].name) == role:
        return _inner(shown[0], role)
    return folder


def identity(path: Path) -> tuple[int, int]:
    """Device and inode: what a file is, whatever it is called; zeros where nobody knows."""
    try:
        facts = path.stat()
    except OSError:
        return (0, 0)
    return (facts.st_dev, facts.st_ino)
