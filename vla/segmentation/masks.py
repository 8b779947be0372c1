"""Folders of images and index masks, as ADE20K and VOC are laid out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.data.captioned import listed
from mmpeft.data.folders import pictures_below, split_folders
from mmpeft.data.options import LoaderOptions
from mmpeft.data.pictures import contents, measured, opened, read, turned
from mmpeft.data.pixels import pixels
from mmpeft.data.texts import cleaned, read_text
from mmpeft.embedded import spoken
from mmpeft.errors import DataError
from mmpeft.vla.segmentation.data import BACKGROUND, IGNORED, NamedPictures, SegmentationData

LOG = logging.getLogger(__name__)
WORTH_A_BAR = 500
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JPEG2000")
"""Formats whose pixels are near to what was saved; WebP and JPEG 2000 may be exact and do not say so."""


class Masked(Dataset[tuple[Tensor, Tensor]]):
    """`images/<name>.jpg` with `masks/<name>.png`, a file of class numbers (grey or palette), also in folders inside.

    A picture is turned as its EXIF orientation says, and its mask with it: a mask of the stored size as the picture
    is, one of the upright size or with an orientation of its own as that says.
    """

    def __init__(
        self, folder: Path, classes: int, background: int | None = None, first: int = 0, ignored: int = IGNORED
    ) -> None:
        if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
            raise DataError(f"{folder} has no folders `images` and `masks`")
        masks, images = (_by_name(folder / name) for name in ("masks", "images"))
        alone = next((name for name in images if name not in masks), None)
        if alone is not None or not images:
            raise DataError(
                f"{images[alone]} has no mask {folder / 'masks'}/{alone}.png" if alone else f"{folder} is empty"
            )
        lost = [path for name, path in masks.items() if name not in images]
        if lost:
            LOG.warning("%d masks of %s are of no picture: %s", len(lost), folder, listed(lost))
        self.names = list(images)
        self.pairs = [(path, masks[name]) for name, path in images.items()]
        self.classes, self.background, self.first, self.ignored = classes, background, first, ignored

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a uint8 image [3, H, W] and class numbers, uint8 [H, W].

        Raises:
            DataError: the mask is of another size, or holds a number that is no class.
        """
        return pixels(read(self.pairs[index][0])), self.mask(index)

    def mask(self, index: int) -> Tensor:
        """Class numbers from 0, 254 for background and 255 for what does not count, uint8 [H, W]."""
        path, file = self.pairs[index]
        number = torch.from_numpy(self._numbers(file, path))
        uncounted, empty = number == self.ignored, torch.zeros(number.shape, dtype=torch.bool)
        empty = empty if self.background is None else number == self.background
        number = number - self.first
        wrong = number[~uncounted & ~empty & ((number < 0) | (number >= self.classes))]
        if len(wrong):
            raise DataError(
                f"{file} holds {int(wrong[0]) + self.first}, the classes are {self.first} … "
                f"{self.first + self.classes - 1} and {self.ignored} does not count; `first` is the number of the "
                "first class, `background` that of no class"
            )
        return number.masked_fill(empty, BACKGROUND).masked_fill(uncounted, IGNORED).to(torch.uint8)

    def _numbers(self, file: Path, path: Path) -> NDArray[np.int64]:
        """What a mask's file holds at each pixel of the upright picture."""
        shown, tag = measured(path)
        mask = opened(contents(file), str(file), still=True)
        image, turn = mask.image, mask.turn
        if image.format in LOSSY:
            raise DataError(f"{file} is a {image.format} file, whose numbers may be mixed at edges; save masks as PNG")
        found = np.asarray(image)
        if found.ndim == 3 and image.mode == "RGB" and (found == found[..., :1]).all():
            found = found[..., 0]
        if image.mode == "F" or found.ndim != 2:
            raise DataError(
                f"{file} has colours of mode {image.mode}: expected one whole number a pixel, the class, grey or with "
                "a palette; replace each colour by its number"
            )
        raw = shown[::-1] if tag > 4 else shown
        if mask.tag == 1 and tag > 1 and found.shape == raw:
            if raw == shown:
                raise DataError(
                    f"{path} is to be turned (EXIF orientation {tag}), and {file} of the same size does not say "
                    "whether it already is; write the picture and its mask upright, without the tag"
                )
            turn = tag
        whole = np.asarray(turned(Image.fromarray(found.astype(np.int32)), turn)).astype(np.int64)
        if whole.shape != shown:
            raise DataError(
                f"{file} is {found.shape}, its image {path.name} {raw}: expected one number a pixel and the same size"
            )
        return whole


class FolderSegmentationData(SegmentationData):
    """`root/classes.txt` (a name a line) and `root/{train,val,test}/{images,masks}`, as ADE20K or VOC are laid out.

    Both count their classes from 1. In ADE20K 0 does not count: `first: 1, ignored: 0`; in VOC it is background, and
    255 does not count: `first: 1, background: 0`. The last `unseen` classes are for testing an open vocabulary: their
    pixels do not count in training. Pictures in `root/predict`, or those of the test, are predicted.
    """

    mirror = True
    small_batch = 8

    def __init__(
        self,
        root: str,
        background: int | None = None,
        first: int = 0,
        ignored: int = IGNORED,
        unseen: int = 0,
        check: bool = True,
        image_size: int = 224,
        batch_size: int = 8,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """
        Args:
            root: the folder.
            background: number in the masks that stands for no class; None if every pixel has one.
            first: number in the masks of the first class of the list.
            ignored: number in the masks of pixels that do not count.
            unseen: classes at the end of the list that are not trained on.
            check: read every mask before the first step, so that a wrong one comes out there.
            image_size: height and width that images and masks are resized to, unless the backbone has its own.
            batch_size: images a training step and process.
            options: those of `DataModule`.

        Raises:
            DataError: the list of classes is missing, empty or names one twice, or fewer than one is seen.
        """
        super().__init__(image_size, batch_size=batch_size, **options)
        self.root, self.background, self.first, self.ignored = Path(root), background, first, ignored
        self.unseen, self.check = unseen, check
        file = self.root / "classes.txt"
        if not file.is_file():
            raise DataError(f"there is no {file}; expected a class name a line, in the order of their numbers")
        self.classes = [spoken(line.strip()) for line in cleaned(read_text(file)).splitlines() if line.strip()]
        if len(set(self.classes)) < max(len(self.classes), 1) or len(self.classes) >= BACKGROUND:
            raise DataError(f"{file} must name 1 … {BACKGROUND - 1} different classes, got {len(self.classes)}")
        if not 0 <= unseen < len(self.classes):
            raise DataError(f"unseen is a number of classes below the {len(self.classes)} of {file}, got {unseen}")

    def datasets(self, stage: str | None = None) -> None:
        """Open the folders that are there; training needs `train`.

        Raises:
            DataError: an image without a mask; with `check`, a mask that is no mask, or a class without pixels.
        """
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        folders = split_folders(self.root)
        for name in wanted.get(stage or "", ("train", "val", "test")):
            if name in folders:
                found = Masked(folders[name], len(self.classes), self.background, self.first, self.ignored)
                setattr(self, f"{name}_set", found)
                if self.check and stage != "predict":
                    self._check(found, name)
        named = _by_name(self.root / "predict") if (self.root / "predict").is_dir() else {}
        if isinstance(self.test_set, Masked) and not named:
            named = {name: path for name, (path, _) in zip(self.test_set.names, self.test_set.pairs)}
        paths = list(named.values())
        self.predict_set = NamedPictures(lambda i: pixels(read(paths[i])), [n.replace("/", "_") for n in named])

    def _check(self, found: Masked, name: str) -> None:
        few = len(found) < WORTH_A_BAR
        pixels = torch.zeros(256, dtype=torch.long)
        for i in track(range(len(found)), f"Checking the masks of {name}", disable=few, transient=True):
            pixels += found.mask(i).flatten().bincount(minlength=256)
        missing = [self.classes[i] for i in range(len(self.classes) - self.unseen) if not pixels[i]]
        if name == "train" and missing:
            raise DataError(
                f"no training mask in {self.root / name} has a pixel of {', '.join(missing)}: nothing can be learned "
                "of it; take it from classes.txt, put it last and count it as `unseen`, or set `check: false`"
            )


def _by_name(folder: Path) -> dict[str, Path]:
    """The picture files of a folder by their path in it without suffix, sorted.

    Raises:
        DataError: two have one name.
    """
    found: dict[str, Path] = {}
    for path in pictures_below(folder, once=False):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(f"{found[name]} and {path} have one name, by which pictures and masks are matched")
        found[name] = path
    return found
