"""Picture files, from bytes to upright sRGB: the one reader of all tasks."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import PIL
from PIL import Image, ImageFile, UnidentifiedImageError

from mmpeft.data.colours import rgb, told
from mmpeft.errors import DataError
from mmpeft.files import kind_of

MOST_BYTES = 2**30
PROBLEM = "cannot be read as a picture"
FOREIGN = ("EPS", "MPEG")  # drawn by another program, or only recognised
STILL = ("MPO", "PSD", "ICO", "ICNS", "CUR")  # further frames are previews, layers or sizes of the same picture
PLUGINS = {  # suffix: the package that teaches Pillow to read it, its module, what registers it
    ".heic": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".heif": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".hif": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".jxl": ("pillow-jxl-plugin", "pillow_jxl", None),
}
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def _plugins() -> None:
    """Register what is installed beside Pillow to read further formats."""
    Image.init()
    for _, module, register in dict.fromkeys(PLUGINS.values()):
        if find_spec(module) is not None:
            found = import_module(module)
            if register is not None:
                getattr(found, register)()


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it reads by itself, to the pixels."""
    _plugins()
    return _decoded_of(tuple(Image.ID))


@lru_cache(4)
def _decoded_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """Asked for each picture; another plugin makes another list."""

    def decodes(name: str) -> bool:
        factory = Image.OPEN[name][0]
        return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))

    return tuple(name for name in names if name not in FOREIGN and name in Image.OPEN and decodes(name))


def suffixes() -> frozenset[str]:
    """How the names of picture files end, with the dot, in lower case: all that Pillow reads."""
    known = set(formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def contents(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        DataError: there is no such file, it is no regular one, is empty or far too large, or it cannot be read.
    """
    with _file(path) as file:
        return file.read()


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    """A picture file, open for reading once it is known to be a file of a possible size."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{path} {PROBLEM}: expected a file, got {kind_of(facts.st_mode)}")
        if facts.st_size > MOST_BYTES:
            raise DataError(f"{path} {PROBLEM}: it has {facts.st_size} bytes, expected {MOST_BYTES} at most")
        with path.open("rb") as file:
            yield file
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no picture {path}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


class Stored(NamedTuple):
    """A picture as its file holds it, decoded."""

    image: Image.Image
    tag: int  # EXIF's orientation, a key of `TURNS` or 1

    @property
    def turn(self) -> int:
        """The orientation that is still to be applied: Pillow turns TIFF files as it decodes them."""
        return 1 if self.image.format == "TIFF" else self.tag


def opened(data: bytes, where: str, still: bool = False) -> Stored:
    """An image file's content, decoded to its end in the file's own mode, and how it is to be turned.

    The size is checked by the header, before anything is decoded: as Pillow's `MAX_IMAGE_PIXELS` says. Of several
    frames the first is taken, and said so.

    Args:
        data: the content.
        where: what an error calls it.
        still: refuse several frames.

    Raises:
        DataError: it is no image, or only a part of one; `where` says which.
    """
    file = io.BytesIO(data)
    with _reading(where, file):
        image = _header(file)
        frames = int(getattr(image, "n_frames", 1)) if image.format not in STILL else 1
        tag = _orientation(image)
        image.load()
    if frames > 1 and still:
        raise DataError(f"{where} is animated: expected one frame, got {frames}; save the frame you mean")
    if frames > 1:
        told(f"{where} has {frames} frames: the first one is read, here and wherever it is shown")
    return Stored(image, tag)


def measured(path: Path) -> tuple[tuple[int, int], int]:
    """Height and width of a picture file when it is upright, and EXIF's orientation, by its header alone.

    Raises:
        DataError: it is no image.
    """
    with _file(path) as file, _reading(str(path), file):
        image = _header(file)
        tag = _orientation(image)
        swapped = tag > 4 and image.format != "TIFF"  # Pillow has turned the size of TIFF files
        return (image.size if swapped else image.size[::-1]), tag


def verified(path: Path) -> str:
    """What is wrong with a picture file by its header, and the checksums of PNG; empty if nothing is.

    A picture cut off in its middle has a good header: that comes out when it is decoded.
    """
    try:
        with _file(path) as file, _reading(str(path), file):
            _header(file).verify()
    except DataError as error:
        return str(error).removeprefix(f"{path} {PROBLEM}: ")
    return ""


def _header(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=formats())
    if min(image.size) < 1:
        raise ValueError(f"its size is {image.width}×{image.height}")
    return image


@contextmanager
def _reading(where: str, file: BinaryIO) -> Iterator[None]:
    """One error for whatever a damaged file leads Pillow's many readers to."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise DataError(f"{where} {PROBLEM}: it is empty; restore or remove it")
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{where} {PROBLEM}: {_unknown(head)}") from error
    except Exception as error:
        said = str(error) or type(error).__name__
        raise DataError(f"{where} {PROBLEM}: {said}; restore or remove it") from error


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing, as in any viewer
        return 1
    return found if found in TURNS else 1


def _unknown(head: bytes) -> str:
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"):
        return "it is HEIC, for which Pillow needs `pip install pillow-heif`"
    return f"its content is none of the formats that Pillow {PIL.__version__} reads; restore or remove it"


def turned(image: Image.Image, turn: int) -> Image.Image:
    """A picture turned as EXIF's orientation says."""
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def decoded(data: bytes, where: str, background: str | None = "white", exact: bool = False) -> Image.Image:
    """An image file's content in sRGB, upright.

    Args:
        data: the content.
        where: what an error calls it.
        background: the colour behind transparent pixels; None to refuse them.
        exact: refuse what only a guess makes one RGB picture: several frames, CMYK without a profile.

    Raises:
        DataError: it is no image, only a part of one, or one that is to be refused.
    """
    stored = opened(data, where, still=exact)
    return turned(rgb(stored.image, where, background, exact), stored.turn)


def read(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file in sRGB, upright, on white.

    Raises:
        DataError: the file is missing or no picture.
    """
    return decoded(contents(Path(path)), str(path))
