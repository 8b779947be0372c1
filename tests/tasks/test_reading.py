"""One reader for pictures: what each task's data make of every kind of file, and what they refuse."""

from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from mmpeft.data import pictures
from mmpeft.data.colours import rgb
from mmpeft.data.pictures import decoded, formats, measured, read, suffixes
from mmpeft.errors import DataError
from tests.support.profiles import ADOBE, P3, profile
from tests.tasks.readers import HEIGHT, READERS, WIDTH, pixels

GRADIENT = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
GRADIENT[..., 0], GRADIENT[..., 1], GRADIENT[..., 2] = 200, np.arange(WIDTH) * 5, np.arange(HEIGHT)[:, None] * 7
PLAIN = Image.fromarray(GRADIENT)
HALF = np.zeros((HEIGHT, WIDTH))
HALF[:, : WIDTH // 2] = 0.5
GREY = Image.fromarray(np.full((HEIGHT, WIDTH), 128, np.uint8) * (HALF > 0).astype(np.uint8))
DARK = Image.fromarray((HALF > 0).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def deep(values: np.ndarray, kind: str = "<u2", mode: str = "I;16") -> Image.Image:
    return Image.frombytes(mode, (WIDTH, HEIGHT), values.astype(kind).tobytes())


def turned(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def converted(image: Image.Image, own: bytes) -> Image.Image:
    """By Pillow's shortest way to sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(own))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")


def lab() -> Image.Image:
    own, other = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
    return ImageCms.profileToProfile(PLAIN, own, other, outputMode="LAB")


def own_srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def bomb() -> bytes:
    """A small PNG file whose header says that it is 20000 pixels wide and high."""
    data = encoded(Image.new("1", (8, 8)))
    head = b"IHDR" + (20000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]


def twelve_bits() -> bytes:
    """A TIFF of 12 bits a sample, which Pillow reads and does not write: half of 4095 and zero, two in three bytes."""
    values = np.where(HALF > 0, 2048, 0).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    tags = {256: WIDTH, 257: HEIGHT, 258: 12, 259: 1, 262: 1, 277: 1, 278: HEIGHT, 279: packed.size}
    return _tiff(tags, packed.astype(np.uint8).tobytes())


def with_sign() -> bytes:
    """A TIFF of 16 bits a sample, one of which is the sign: half of 32767 and zero."""
    body = (HALF * 32767).round().astype("<i2").tobytes()
    return _tiff({256: WIDTH, 257: HEIGHT, 258: 16, 259: 1, 262: 1, 277: 1, 278: HEIGHT, 279: len(body), 339: 2}, body)


def _tiff(tags: dict[int, int], body: bytes) -> bytes:
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted({**tags, 273: start}.items())
    directory = b"".join(n.to_bytes(2, "little") + b"\4\0\1\0\0\0" + v.to_bytes(4, "little") for n, v in entries)
    return b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + directory + b"\0\0\0\0" + body


def saved(kind: str) -> Image.Image:
    return Image.open(io.BytesIO(encoded(PLAIN, kind)))


SUFFIXES = {
    ".avif": "AVIF", ".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".jp2": "JPEG2000", ".tga": "TGA", ".ppm": "PPM",
    ".webp": "WEBP", ".bmp": "BMP",
}  # fmt: skip
Row = tuple[Callable[[], bytes], str, Callable[[], Image.Image]]
P3_PROFILE = profile(P3)
ROWS: dict[str, Row] = {
    "1": (lambda: encoded(PLAIN.convert("1")), ".png", lambda: PLAIN.convert("1")),
    "L": (lambda: encoded(PLAIN.convert("L")), ".png", lambda: PLAIN.convert("L")),
    "P": (lambda: encoded(PLAIN.convert("P")), ".png", lambda: PLAIN.convert("P")),
    "LA": (lambda: encoded(PLAIN.convert("LA")), ".png", lambda: PLAIN.convert("L")),
    "RGBA": (lambda: encoded(PLAIN.convert("RGBA")), ".png", lambda: PLAIN),
    "YCbCr": (lambda: encoded(PLAIN.convert("YCbCr"), "TIFF"), ".tif", lambda: PLAIN.convert("YCbCr")),
    "LAB": (lambda: encoded(lab(), "TIFF"), ".tif", lab),
    "I;16": (lambda: encoded(deep(HALF * 65535)), ".png", lambda: GREY),
    "I;16 dark": (lambda: encoded(deep((HALF > 0) * 255)), ".png", lambda: DARK),
    "I;16B": (lambda: encoded(deep(HALF * 65535, ">u2", "I;16B"), "TIFF"), ".tif", lambda: GREY),
    "I;16 white is 0": (
        lambda: encoded(deep((1 - HALF) * 65535), "TIFF", tiffinfo={262: 0}), ".tif", lambda: GREY
    ),
    "I;12": (twelve_bits, ".tif", lambda: GREY),
    "I;16S": (with_sign, ".tif", lambda: GREY),
    "I": (lambda: encoded(Image.fromarray((HALF * 65535).astype(np.int32)), "TIFF"), ".tif", lambda: GREY),
    "PGM": (lambda: b"P5 48 32 65535\n" + (HALF * 65535).astype(">u2").tobytes(), ".pgm", lambda: GREY),
    "PGM 12": (lambda: b"P5 48 32 4095\n" + (HALF * 4095).round().astype(">u2").tobytes(), ".pgm", lambda: GREY),
    "F": (lambda: encoded(Image.fromarray(HALF.astype(np.float32)), "TIFF"), ".tif", lambda: GREY),
    "L clear": (lambda: encoded(GREY, transparency=0), ".png", lambda: _on_white(GREY)),
    "I;16 clear": (lambda: encoded(deep(HALF * 65535), transparency=0), ".png", lambda: _on_white(GREY)),
    "P3": (lambda: encoded(PLAIN, icc_profile=P3_PROFILE), ".png", lambda: converted(PLAIN, P3_PROFILE)),
    "P3 and alpha": (
        lambda: encoded(PLAIN.convert("RGBA"), icc_profile=P3_PROFILE), ".png", lambda: converted(PLAIN, P3_PROFILE)
    ),
    "P3 and palette": (
        lambda: encoded(PLAIN.quantize(16), icc_profile=P3_PROFILE), ".png",
        lambda: converted(PLAIN.quantize(16).convert("RGB"), P3_PROFILE),
    ),
    "Adobe RGB": (
        lambda: encoded(PLAIN, "TIFF", icc_profile=profile(ADOBE)), ".tif", lambda: converted(PLAIN, profile(ADOBE))
    ),
    "grey profile": (
        lambda: encoded(GREY, icc_profile=profile(gamma=1.0)), ".png", lambda: converted(GREY, profile(gamma=1.0))
    ),
    "sRGB": (lambda: encoded(PLAIN, icc_profile=own_srgb()), ".png", lambda: PLAIN),
    "damaged profile": (lambda: encoded(PLAIN, icc_profile=b"no profile"), ".png", lambda: PLAIN),
    "profile of grey": (lambda: encoded(PLAIN, icc_profile=profile(gamma=1.0)), ".png", lambda: PLAIN),
    **{suffix: (partial(encoded, PLAIN, kind), suffix, partial(saved, kind)) for suffix, kind in SUFFIXES.items()},
}  # fmt: skip


def _on_white(image: Image.Image) -> Image.Image:
    return image.point(lambda value: value or 255)


def shown(folder: Path, data: bytes, suffix: str) -> dict[str, Tensor | str]:
    """What each task's network is shown of a file, or the error that its data raise."""
    found: dict[str, Tensor | str] = {}
    for name, reader in READERS.items():
        (folder / name).mkdir(parents=True)
        try:
            found[name] = reader(folder / name, data, suffix)
        except DataError as error:
            found[name] = str(error)
    return found


def off(found: torch.Tensor | str, expected: Image.Image) -> float | str:
    """By how many levels of 255 a picture is another than expected."""
    if isinstance(found, str):
        return found
    wanted = pixels(expected.convert("RGB"))
    return float((found - wanted).abs().max()) * 255 if found.shape == wanted.shape else f"{tuple(found.shape)}"


@pytest.mark.parametrize("row", ROWS)
def test_every_task_sees_the_same_pixels(row: str, tmp_path: Path) -> None:
    make, suffix, expected = ROWS[row]
    wrong = {name: off(found, expected()) for name, found in shown(tmp_path, make(), suffix).items()}
    assert all(isinstance(levels, float) and levels < 1.5 for levels in wrong.values()), wrong


REFUSED: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "floats beyond 1": (
        lambda: encoded(Image.fromarray(HALF.astype(np.float32) * 255), "TIFF"), ".tif", r"0 … 127.5 of mode F.*0 … 1:"
    ),
    "nan": (lambda: encoded(Image.fromarray(HALF.astype(np.float32) * np.nan), "TIFF"), ".tif", "nan"),
    "32 bits": (lambda: encoded(Image.fromarray(HALF.astype(np.int32) + 70000), "TIFF"), ".tif", "0 … 65535"),
    "negative": (lambda: encoded(Image.fromarray(HALF.astype(np.int32) - 5), "TIFF"), ".tif", "values -5"),
    "cut": (lambda: encoded(PLAIN, "JPEG", quality=100)[:900], ".jpg", "truncated"),
    "empty": (lambda: b"", ".png", "empty"),
    "text": (lambda: b"no picture at all, only text", ".png", "none of the formats"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ".png", "none of the formats"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ".png", "pillow-heif"),
    "bomb": (bomb, ".png", "exceeds limit"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_every_task_refuses_what_is_no_picture(row: str, tmp_path: Path) -> None:
    make, suffix, message = REFUSED[row]
    for name, found in shown(tmp_path, make(), suffix).items():
        assert isinstance(found, str), name
        assert re.search(message, found), (name, found)


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation(tag: int, tmp_path: Path) -> None:
    """As PIL's own viewer: what a file holds at its first row is elsewhere once it is upright."""
    expected = {1: PLAIN, **{t: PLAIN.transpose(how) for t, how in pictures.TURNS.items()}}[tag]
    for name, found in shown(tmp_path, encoded(PLAIN, exif=turned(tag)), ".png").items():
        if name == "segmentation" and tag in (2, 3, 4):
            assert "does not say whether it already is" in str(found)  # a mask without a tag
        else:
            assert off(found, expected) == 0, name


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_of_tiff_files_is_applied_once(tag: int, tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(encoded(PLAIN, "TIFF", tiffinfo={274: tag}))
    shown = PLAIN.transpose(pictures.TURNS[tag]) if tag > 1 else PLAIN
    assert torch.equal(pixels(read(tmp_path / "x.tif")), pixels(shown))
    assert measured(tmp_path / "x.tif") == (shown.size[::-1], tag)


def test_cmyk_by_its_profile_or_as_pillow_takes_it(tmp_path: Path) -> None:
    data = encoded(PLAIN.convert("CMYK"), "TIFF")
    assert torch.equal(READERS["command"](tmp_path, data, ".tif"), pixels(PLAIN.convert("CMYK").convert("RGB")))
    with pytest.raises(DataError, match=r"mode CMYK without a colour profile .*sRGB\.icc"):
        decoded(data, "x", exact=True)


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", ".gif"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")])
def test_of_several_frames_the_first_is_read_and_said(
    kind: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = PLAIN.quantize(8).convert("RGB"), PLAIN.rotate(180)
    options = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / f"x{suffix}").write_bytes(encoded(first, kind, save_all=True, append_images=[second], **options))
    assert torch.equal(pixels(read(tmp_path / f"x{suffix}")), pixels(first))
    read(tmp_path / f"x{suffix}")
    assert caplog.text.count(f"x{suffix} has 2 frames: the first one is read") == 1


def test_transparency_of_every_kind_lies_on_the_background() -> None:
    for mode in ("RGBA", "LA"):
        assert decoded(encoded(Image.new(mode, (2, 2))), "x").getpixel((0, 0)) == (255, 255, 255)
    palette = encoded(Image.new("P", (2, 2)), transparency=b"\0")
    assert decoded(palette, "x").getpixel((0, 0)) == (255, 255, 255)
    cut = Image.new("RGB", (2, 2), (1, 2, 3))
    assert decoded(encoded(cut, transparency=(1, 2, 3)), "x", "#ff0000").getpixel((0, 0)) == (255, 0, 0)
    assert rgb(Image.new("RGBa", (2, 2), (0, 0, 0, 0)), "x").getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(DataError, match="has transparent pixels; set background"):
        decoded(encoded(cut, transparency=(1, 2, 3)), "x", None)


def test_pipes_devices_and_loops_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, what in (("pipe", "a pipe"), ("zero", "a device"), ("loop", "cannot be read")):
        with pytest.raises(DataError, match=what):
            read(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match="got a folder"):
        read(tmp_path)


def test_what_pillow_reads_is_known_by_its_own_list() -> None:
    own = {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats()}
    assert suffixes() == own
    assert suffixes() >= {".avif", ".jfif", ".jpe", ".jp2", ".tga", ".jpg", ".png", ".webp", ".gif", ".tif", ".qoi"}
    assert not suffixes() & {".eps", ".h5", ".mpg", ".pdf", ".txt"}


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_raise_our_error_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF and TIFF tags
        for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "TGA", "PPM", "JPEG2000", "AVIF"):
            whole = encoded(PLAIN, kind)
            for _ in range(6):
                data = bytearray(whole[: draw.integers(1, len(whole) + 1)])
                for place in draw.integers(0, len(data), draw.integers(0, 6)):
                    data[place] = draw.integers(0, 256)
                with suppress(DataError):
                    assert decoded(bytes(data), "x").mode == "RGB"
