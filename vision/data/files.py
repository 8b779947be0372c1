"""Image files on disk: reading them as RGB, and finding unreadable ones before a run starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from rich.progress import track

from mmpeft.errors import DataError

LOG = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
WORTH_A_BAR = 2000


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any mode into RGB: turned upright by EXIF, transparency over white, 16 bit scaled to 8."""
    image = ImageOps.exif_transpose(image)
    extrema: Any = image.getextrema() if image.mode.startswith("I") else (0, 0)  # a pair of one band
    if extrema[1] > 255:
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        DataError: the file is missing, damaged or no image.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}; restore or remove the file") from error


class ImageFiles:
    """Samples `(RGB image, label or identifier)` read from files when asked for."""

    def __init__(self, paths: Sequence[str | Path], second: Sequence[Any]) -> None:
        self.paths, self.second = [str(path) for path in paths], list(second)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Return one image and its label or identifier."""
        return read_rgb(self.paths[index]), self.second[index]


def images_below(folder: Path) -> list[Path]:
    """All image files in a folder and the folders inside it, sorted; hidden ones left out."""
    found = []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(directory, name) for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    return sorted(found)


def unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """Check headers (and the checksums of PNG files) and return what is wrong with the broken files.

    A picture cut off in its middle has a good header; `read_rgb` reports it when it is reached.
    """
    wrong: dict[Path, str] = {}
    for path in track(paths, "Checking images", disable=len(paths) < WORTH_A_BAR, transient=True):
        try:
            with Image.open(path) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            wrong[path] = "not an image" if "cannot identify" in str(error) else str(error)
    return wrong


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
