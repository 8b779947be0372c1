"""Image files with labels, and finding unreadable ones before a run starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from mmpeft.data.pictures import read, verified
from mmpeft.errors import DataError

LOG = logging.getLogger(__name__)
WORTH_A_BAR = 2000


class ImageFiles:
    """Samples `(RGB image, label or identifier)` read from files when asked for."""

    def __init__(self, paths: Sequence[str | Path], second: Sequence[Any]) -> None:
        self.paths, self.second = [str(path) for path in paths], list(second)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Return one image and its label or identifier."""
        return read(self.paths[index]), self.second[index]


def unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """What is wrong with the broken files, as `verified` sees it."""
    shown = track(paths, "Checking images", disable=len(paths) < WORTH_A_BAR, transient=True)
    return {path: reason for path in shown if (reason := verified(path))}


def readable(paths: Sequence[Path], skip: bool) -> list[Path]:
    """Return the readable files.

    Raises:
        DataError: some are not readable, and `skip` is false; with `skip` they are left out and counted in a warning.
    """
    wrong = unreadable(paths)
    if not wrong:
        return list(paths)
    names = "; ".join(f"{path}: {reason}" for path, reason in list(wrong.items())[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    if not skip:
        raise DataError(
            f"{len(wrong)} of {len(paths)} image files cannot be read: {names}{more}; "
            "repair or remove them, or pass skip_unreadable=True"
        )
    LOG.warning("skipped %d of %d image files that cannot be read: %s%s", len(wrong), len(paths), names, more)
    return [path for path in paths if path not in wrong]
