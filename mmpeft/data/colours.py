"""Colours of a picture as sRGB with eight bits a channel, whatever mode and colour profile its file has."""

from __future__ import annotations

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageColor
from PIL.ImageCms import ImageCmsTransform

from mmpeft.errors import DataError

LOG = logging.getLogger(__name__)
BITS = 258  # TIFF's tag of bits a sample
WRITTEN = 339  # TIFF's tag of how numbers are written; 2 for whole ones with a sign
WHITE_IS = 262  # TIFF's tag of how numbers become grey; 0 for white
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # a profile's colour space: mode of its pictures
GREYS = ("1", "L", "LA", "La")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
EXACT = 2  # levels by which a profile may differ from sRGB and still be it

_told: set[str] = set()


def told(message: str) -> None:
    """Log a warning once in a process: a picture is read in every epoch."""
    if message not in _told:
        _told.add(message)
        LOG.warning(message)


def rgb(image: Image.Image, where: str, background: str | None = "white", exact: bool = False) -> Image.Image:
    """A decoded picture in sRGB, on a background where it is transparent.

    Deep pictures are scaled by what their mode holds, never by the values that are found: 0 … 65535 in 16 bits (4095
    in TIFF's 12, 32767 with a sign), 0 … 1 in floating point.

    Args:
        image: as it was decoded.
        where: what an error calls it.
        background: a colour; None to refuse transparent pixels.
        exact: refuse colours that nobody has defined, CMYK without a profile.

    Raises:
        DataError: values lie outside what the mode means, or what is to be refused is there.
    """
    profile = image.info.get("icc_profile")
    alpha = _alpha(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _narrowed(image, where)
    found = _managed(image, profile, where) if profile else None
    if found is None and image.mode == "CMYK" and exact:
        raise DataError(
            f"{where} has colours of mode CMYK without a colour profile that can be used, expected RGB or grey; "
            "convert it where you see the result, such as `magick in.jpg -profile sRGB.icc out.png`"
        )
    found = found or _plain(image)
    if alpha is None or alpha.getextrema() == (255, 255):
        return found
    if background is None:
        raise DataError(f"{where} has transparent pixels; set background: white to lay such images on white")
    paper = Image.new("RGB", found.size, ImageColor.getrgb(background)[:3])
    found.putalpha(alpha)
    return Image.alpha_composite(paper.convert("RGBA"), found).convert("RGB")


def _plain(image: Image.Image) -> Image.Image:
    """RGB by Pillow's own rules, transparency left out."""
    return (image.convert("RGBA") if image.mode in ("P", "PA", "RGBa", "La") else image).convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, 0 … 255; None where nothing is said of it."""
    if not image.has_transparency_data:
        return None
    clear = image.info.get("transparency")
    if isinstance(clear, int) and image.mode in ("1", "L", "I", *DEEP):
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        return Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    if isinstance(clear, tuple) and max(clear) > 255:  # of a 16-bit PNG, whose pixels Pillow has cut to 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA").getchannel("A")


def _narrowed(image: Image.Image, where: str) -> Image.Image:
    """A picture of one deep channel with eight bits."""
    values = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", {})
    depth = min(tags.get(BITS, (16,)))
    bits = depth - 1 if depth <= 16 and 2 in tags.get(WRITTEN, ()) else min(depth, 16)
    top = 1.0 if image.mode == "F" else float(2**bits - 1)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):
        raise DataError(
            f"{where} has values {low:g} … {high:g} of mode {image.mode}, expected 0 … {top:g}: what is white there is "
            "not known; scale them, and save 8 or 16 bits"
        )
    if tags.get(WHITE_IS) == 0 and image.mode in DEEP:  # Pillow turns them over in 8 bits alone
        values = top - values
    return Image.fromarray(np.floor(values * (255 / top) + 0.5).astype(np.uint8))


def _managed(image: Image.Image, profile: bytes, where: str) -> Image.Image | None:
    """The colours by their profile; None where it says nothing that can be used, or sRGB."""
    try:
        mode, transform = _transform(profile)
        base = image.convert("L") if mode == "L" else image
        if transform is None or (mode in ("L", "RGB") and (image.mode in GREYS) != (mode == "L")):
            return None
        if mode == "RGB" and image.mode not in ("CMYK", "LAB"):
            base = _plain(image)
        if base.mode != mode:
            raise ValueError(f"it is for {mode}, the picture is {image.mode}")
        return ImageCms.applyTransform(base, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError) as error:
        told(f"{where}: its colour profile cannot be used ({error}); the colours are taken as they are")
        return None


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, ImageCmsTransform | None]:
    """The mode that a profile is for, and the way to sRGB; None where that changes nothing."""
    found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = SPACES[found.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        steps = np.linspace(0, 255, 9).astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
        after = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
        if np.abs(after.astype(int) - grid).max() <= EXACT:
            return mode, None
    return mode, transform
