"""`ImageData`: what all image classification data modules share — classes, size, normalisation, augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Unpack, get_args

import torch
from torch import Tensor

from mmpeft.data.contract import Preprocessed, Preprocessing, Resize, Resizing
from mmpeft.data.files import ImageFiles
from mmpeft.data.inputs import Inputs
from mmpeft.data.loading import DataModule
from mmpeft.data.options import Augment, ImageOptions
from mmpeft.data.sampling import SizedDataset
from mmpeft.data.transforms import AUGMENTS, OfImage, evaluation, training
from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.types import Argument, Leaf

FALLBACK = Preprocessing((224, 224))


class AugmentedImages(Preprocessed, DataModule):
    """Images of one size, normalised and augmented: samples whose first member is a PIL image or uint8 [3, H, W].

    Size, mean and std are the backbone's own unless given here.
    """

    paper: ClassVar[int | None] = None
    """Grey value behind drawings, 0 or 255; None for photographs."""

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment = "light",
        resize: Resize | None = None,
    ) -> None:
        """
        Args:
            batch_size: images a training step and process.
            num_workers: loading processes; the batches do not depend on it.
            seed: of the order and the augmentation.
            eval_batch_size: images a validation, test or prediction step; None for as many as suits the data.
            image_size: height and width in pixels; None for what the backbone was pretrained with.
            mean: three channel means of images in [0, 1]; None for the backbone's.
            std: three channel deviations; None for the backbone's.
            augment: `none` (resize alone), `light` (crop and flip, or a small shift and turn of drawings), `strong`.
            resize: how pictures of another shape are evaluated: `squash`, `shortest` (the middle is cut out) or
                `longest` (borders are added); None for what the backbone was evaluated with, `squash` for drawings.

        Raises:
            ConfigError: a value is out of its range, or the augmentation is unknown.
        """
        super().__init__(batch_size, num_workers, seed, eval_batch_size)
        if augment not in AUGMENTS:
            raise ConfigError(
                f"augment is one of {', '.join(AUGMENTS)}, got {augment!r}.{nearest(str(augment), AUGMENTS)}"
            )
        if image_size is not None and image_size < 1:
            raise ConfigError(
                f"image_size is a number of pixels >= 1, got {image_size}; leave it out for the backbone's"
            )
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
                positive = "positive " if name == "std" else ""
                raise ConfigError(f"{name} is three {positive}numbers for images in [0, 1], got {list(values)}")
        if resize not in (None, *get_args(Resize)):
            known = get_args(Resize)
            raise ConfigError(f"resize is one of {', '.join(known)}, got {resize!r}.{nearest(str(resize), known)}")
        self.image_size, self.augment, self.resize = image_size, augment, resize
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.given = (image_size, self.mean, self.std)
        self.size = (image_size, image_size) if image_size else FALLBACK.size
        self.resizing = FALLBACK.resizing

    def preprocess(self, wanted: Preprocessing) -> None:
        """Take size, normalisation and resizing from the backbone where the user has given none."""
        side, mean, std = self.given
        size = wanted.size if side is None else (side, side)
        if wanted.fixed and size != wanted.size:
            raise ConfigError(
                f"the backbone takes images of {wanted.size[0]}×{wanted.size[1]} pixels alone, image_size is {side}; "
                "leave it out, or build the backbone for that size (model_args: {img_size: …}, of a pair image_size)"
            )
        self.image_size = size[0] if size[0] == size[1] else None
        self.mean, self.std = mean or wanted.mean, std or wanted.std
        self.size, self.resizing = size, wanted.resizing
        self._set_transforms()

    def setup(self, stage: str | None = None) -> None:
        """Lightning's hook: fill the sets, then build the transforms for what is known of the backbone."""
        super().setup(stage)
        self._set_transforms()

    def take(self, inputs: Inputs) -> None:
        """Predict pictures, each by its path."""
        paths = inputs.pictures()
        self.predict_set = ImageFiles(paths, [str(path) for path in paths])

    def _set_transforms(self) -> None:
        mean, std = self.mean or FALLBACK.mean, self.std or FALLBACK.std
        resizing = Resizing() if self.paper is not None else self.resizing  # drawings are never cropped
        if self.resize is not None:
            resizing = Resizing(self.resize, resizing.interpolation)
        self.train_transform = OfImage(training(self.augment, self.size, mean, std, self.paper, resizing))
        self.eval_transform = OfImage(evaluation(self.size, mean, std, resizing))


class ImageData(AugmentedImages):
    """Batches of `(images float [B, 3, S, S] normalised, labels int64 [B])`; to predict, `(images, identifiers)`.

    A subclass fills the sets with samples `(PIL image or uint8 [3, H, W], label)` and names its `classes`.
    """

    def __init__(self, *former: Argument, **options: Unpack[ImageOptions]) -> None:
        """
        Args:
            former: options by position, as older data modules give them.
            options: those of `AugmentedImages`.
        """
        super().__init__(*former, **options)
        self.classes: list[str] = []

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 before they are known."""
        return len(self.classes)


class Pairs:
    """Samples `(images[i], second[i])` from uint8 images `[n, 3, H, W]` and labels or identifiers."""

    def __init__(self, images: Tensor, second: Tensor | Sequence[object]) -> None:
        self.images, self.second = images, second

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, object]:
        """Return one image (a copy: a transform may write into it) and its label or identifier."""
        second = self.second[index]
        return self.images[index].clone(), int(second) if isinstance(second, Tensor) else second


class Renamed:
    """The images of a labelled set with identifiers in place of labels, for prediction."""

    def __init__(self, dataset: SizedDataset, name: Callable[[int], str]) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Leaf, str]:
        """Return one image and its identifier."""
        return self.dataset[index][0], self.name(index)


def check_label_column(labels: Sequence[Leaf], classes: int, where: Callable[[int], str], remedy: str) -> list[int]:
    """Return labels as integers in [0, classes).

    Raises:
        DataError: a label is missing, no integer, negative or too large; `where(row)` says which.
    """
    for row, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(f"{where(row)}: expected an integer label, got {label!r}; {remedy}")
        if not 0 <= label < classes:
            raise DataError(f"{where(row)}: label {label} is out of range 0 … {classes - 1}; {remedy}")
    return list(labels)


def draw_shots(labels: Sequence[int] | Tensor, shots: int, classes: int, seed: int) -> list[int]:
    """Rows of `shots` samples of each class, drawn by `seed`; the choice for k shots is part of that for k + 1.

    Raises:
        ConfigError: `shots` is below one.
        DataError: a class has fewer samples.
    """
    if shots < 1:
        raise ConfigError(f"shots is a number of images a class >= 1, got {shots}; leave it out for all images")
    found = torch.as_tensor(labels)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    rows = []
    for label in range(classes):
        own = order[found[order] == label]
        if len(own) < shots:
            raise DataError(f"shots={shots}, but class {label} has {len(own)} training images; ask for fewer shots")
        rows += own[:shots].tolist()
    return rows
