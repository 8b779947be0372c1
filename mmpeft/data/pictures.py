"""Image files, from bytes to upright RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image, ImageOps

from mmpeft.errors import DataError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def pictures_below(folder: Path) -> list[Path]:
    """All image files in a folder and the folders inside it, sorted; hidden ones left out."""
    found = []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(directory, n) for n in names if n.lower().endswith(PICTURES) and not n.startswith(".")]
    return sorted(found)


def opened(data: bytes, where: str) -> Image.Image:
    """An image file's content, decoded to its end, in the file's own mode and orientation.

    Raises:
        DataError: it is no image, or only a part of one; `where` says which.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be read as a picture: {error}") from error
    return image


def decoded(data: bytes, where: str) -> Image.Image:
    """An image file's content in RGB, upright, on white.

    Raises:
        DataError: it is no image, or only a part of one; `where` says which.
    """
    return flat(ImageOps.exif_transpose(opened(data, where)))


def contents(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no picture {path}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read(path: Path) -> Image.Image:
    """A picture file in RGB, upright, on white.

    Raises:
        DataError: the file is missing or no picture.
    """
    return decoded(contents(path), str(path))


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels may be transparent: by a channel, or by a palette or colour that says so."""
    return image.mode in ("LA", "P", "PA", "RGBA", "RGBa") or "transparency" in image.info


def flat(image: Image.Image, background: str = "white") -> Image.Image:
    """An image in RGB; what is transparent shows the background."""
    if not has_alpha(image):
        return image.convert("RGB")
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, background), whole).convert("RGB")
