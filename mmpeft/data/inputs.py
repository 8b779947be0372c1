"""What a user gives a finished run to predict: pictures and folders of them, and texts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmpeft.data.files import readable
from mmpeft.data.folders import Search
from mmpeft.errors import DataError


@dataclass(frozen=True)
class Inputs:
    """Words after `mmpeft predict RUN`, and those after `--text`."""

    given: tuple[str, ...]
    texts: tuple[str, ...] = ()

    def pictures(self) -> list[Path]:
        """The readable picture files that were given, those in folders too.

        Raises:
            DataError: one is not there or cannot be read, or a folder holds none.
        """
        return picture_files(self.given)

    def named(self) -> dict[str, Path]:
        """The pictures by names that are fit for files: what is below their common folder, without the suffix."""
        paths = self.pictures()
        common = Path(os.path.commonpath([path.resolve().parent for path in paths]))
        found: dict[str, Path] = {}
        for path in paths:
            name = "_".join(path.resolve().relative_to(common).with_suffix("").parts)
            found[_free(name, found)] = path
        return found


def picture_files(given: Sequence[str], skip: bool = False) -> list[Path]:
    """Picture files by their names and those of folders, in order.

    Raises:
        DataError: one is not there, a folder holds none, or a file is not readable and `skip` is false.
    """
    paths: list[Path] = []
    search = Search()
    for name in given:
        path = Path(name)
        found = search.below(path) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            what = "holds no image files" if path.is_dir() else "does not exist"
            left = f" (left out: {search.listed()})" if search.left else ""
            raise DataError(f"predict: {path} {what}{left}; give image files or folders of them")
        paths += found
    search.tell("what is to be predicted")
    return readable(paths, skip)


def file_names(texts: Sequence[str]) -> list[str]:
    """A name for a file from each text, all different."""
    found: dict[str, None] = {}
    for text in texts:
        found[_free(file_name(text), found)] = None
    return list(found)


def file_name(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:60] or "text"


def _free(name: str, known: object) -> str:
    """The name, or the first of `name_2`, `name_3`, … that is not known."""
    assert isinstance(known, dict)
    number, free = 1, name
    while free in known:
        number += 1
        free = f"{name}_{number}"
    return free
