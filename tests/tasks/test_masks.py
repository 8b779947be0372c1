"""Masks of every kind beside pictures of every orientation: class numbers at the right pixels, or a refusal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpeft.data.pictures import TURNS
from mmpeft.errors import DataError
from mmpeft.vla.segmentation.masks import FolderSegmentationData
from tests.tasks.test_reading import encoded, turned

NUMBERS = (np.arange(6)[:, None] // 3 + np.arange(10) // 4).astype(np.uint8)  # [6, 10], 0 … 3
PALETTE = [9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200]


def picture(numbers: np.ndarray = NUMBERS) -> Image.Image:
    """One whose red is 50 times the class number."""
    return Image.fromarray(np.stack([numbers * 50, numbers * 0, numbers * 0], -1))


def mask(numbers: np.ndarray = NUMBERS) -> Image.Image:
    return Image.fromarray(numbers)


def folder(root: Path, image: bytes, stored: bytes, suffix: str = ".png", name: str = "x") -> FolderSegmentationData:
    for inside in ("images", "masks"):
        (root / "train" / inside / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    (root / "train" / "images" / f"{name}.png").write_bytes(image)
    (root / "train" / "masks" / f"{name}{suffix}").write_bytes(stored)
    return FolderSegmentationData(str(root), check=False)


def agree(data: FolderSegmentationData) -> bool:
    """Whether each pixel's colour says what its mask says."""
    data.setup("fit")
    image, numbers = data.train_set[0]
    return image.shape[1:] == numbers.shape and bool((image[0] == numbers * 50).all())


def palette() -> Image.Image:
    image = Image.fromarray(NUMBERS, "P")
    image.putpalette(PALETTE)
    return image


KINDS = {
    "grey": (lambda: encoded(mask()), ".png"),
    "palette": (lambda: encoded(palette()), ".PNG"),
    "grey in RGB": (lambda: encoded(mask().convert("RGB")), ".png"),
    "16 bits": (lambda: encoded(Image.fromarray(NUMBERS.astype(np.uint16))), ".png"),
    "tiff": (lambda: encoded(Image.fromarray(NUMBERS.astype(np.int32)), "TIFF"), ".tif"),
    "bmp": (lambda: encoded(mask(), "BMP"), ".bmp"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_masks(kind: str, tmp_path: Path) -> None:
    make, suffix = KINDS[kind]
    assert agree(folder(tmp_path, encoded(picture()), make(), suffix))


def test_a_mask_of_one_bit(tmp_path: Path) -> None:
    ones = NUMBERS.clip(max=1)
    assert agree(folder(tmp_path, encoded(picture(ones)), encoded(mask(ones * 255).convert("1"))))


REFUSED = {
    "colours": (lambda: encoded(palette().convert("RGB")), ".png", "colours of mode RGB: expected one whole number"),
    "alpha": (lambda: encoded(mask().convert("LA")), ".png", "colours of mode LA"),
    "floats": (lambda: encoded(Image.fromarray(NUMBERS.astype(np.float32)), "TIFF"), ".tif", "colours of mode F"),
    "no class": (lambda: encoded(mask(NUMBERS + 2)), ".png", "holds 4, the classes are 0 … 3"),
    "beyond 8 bits": (lambda: encoded(Image.fromarray(NUMBERS + np.uint16(256))), ".png", "holds 256"),
    "size": (lambda: encoded(mask(NUMBERS[:, 1:])), ".png", r"is \(6, 9\), its image x\.png \(6, 10\)"),
    "lossy": (lambda: encoded(mask(), "JPEG"), ".jpg", "is a JPEG file, whose numbers may be mixed"),
    "frames": (lambda: encoded(mask(), "GIF", save_all=True, append_images=[mask(NUMBERS[::-1])]), ".gif", "animated"),
    "cut": (lambda: encoded(mask())[:-40], ".png", "cannot be read as a picture"),
    "empty": (lambda: b"", ".png", "it is empty"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_no_mask(row: str, tmp_path: Path) -> None:
    make, suffix, message = REFUSED[row]
    with pytest.raises(DataError, match=message):
        agree(folder(tmp_path, encoded(picture()), make(), suffix))


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["as stored", "upright", "with its tag"])
def test_a_mask_is_turned_with_its_picture(kind: str, tag: int, tmp_path: Path) -> None:
    upright = mask().transpose(TURNS[tag])
    stored = {"as stored": encoded(mask()), "upright": encoded(upright)}
    stored["with its tag"] = encoded(mask(), exif=turned(tag))
    assert agree(folder(tmp_path, encoded(picture(), exif=turned(tag)), stored[kind]))


@pytest.mark.parametrize("tag", [2, 3, 4])
def test_a_mask_that_may_be_turned_or_not_is_refused(tag: int, tmp_path: Path) -> None:
    image = encoded(picture(), exif=turned(tag))
    with pytest.raises(DataError, match=rf"EXIF orientation {tag}\), and .* does not say"):
        agree(folder(tmp_path, image, encoded(mask())))
    assert agree(folder(tmp_path, image, encoded(mask(), exif=turned(tag))))


def test_folders_inside_and_masks_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, encoded(picture()), encoded(mask()), name="city/one")
    data = folder(tmp_path, encoded(picture()), encoded(mask()), name="town/one")
    Image.fromarray(NUMBERS).save(tmp_path / "train/masks/alone.png")
    os.rename(tmp_path / "train", tmp_path / "Training")
    (tmp_path / "Training" / "images" / "notes.doc").write_text("x")
    assert agree(data)
    assert data.train_set.names == ["city/one", "town/one"]
    assert "1 masks of " in caplog.text
    assert "1 .doc" in caplog.text
    Image.fromarray(NUMBERS).save(tmp_path / "Training/images/city/one.bmp")
    with pytest.raises(DataError, match=r"one\.bmp and .*one\.png have one name"):
        data.setup("fit")
