"""Images with a class at each pixel: composed scenes of emoji, and folders of images and index masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from mmpeft.embedded import emoji, spoken
from mmpeft.embedded.emoji import EmojiSet
from mmpeft.embedded.scenes import compose
from mmpeft.errors import ConfigError, DataError
from mmpeft.training.data import DataModule
from mmpeft.training.image_data import FALLBACK_MEAN, FALLBACK_STD
from mmpeft.vla.data.captions import read

IGNORED, BACKGROUND = 255, 254
KINDS = (
    "country-flag", "animal-mammal", "clothing", "transport-ground", "food-prepared", "sky & weather", "person-role",
    "alphanum", "time", "food-fruit", "place-building", "geometric", "animal-bird", "heart", "game", "face-concerned",
)  # fmt: skip
HELD_BACK = 6
"""Every sixth training identity of a kind is for validation."""


class SegmentationData(DataModule):
    """Batches `(images float [B, 3, S, S] normalised, target int64 [B, S, S])`.

    Target holds class numbers, 254 for background and 255 for what does not count. `classes` are all names, the last
    `unseen` of which no training image shows.
    """

    classes: list[str]
    unseen = 0

    def __init__(self, batch_size: int, num_workers: int, seed: int, image_size: int, eval_batch_size: int) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size)
        self.image_size = image_size
        self.configure(image_size, FALLBACK_MEAN, FALLBACK_STD)

    def configure(self, image_size: int | Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        """Take the normalisation of the backbone; scenes and masks keep the size that was asked for."""
        self.train_transform = self.eval_transform = Prepared(self.image_size, mean, std)


class Prepared:
    """Resize image and mask, the mask without mixing classes; scale and normalise the image."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.steps = v2.Compose(
            [
                v2.Resize((size, size), interpolation=InterpolationMode.BICUBIC, antialias=True),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            ]
        )
        self.normalise = v2.Normalize(list(mean), list(std))

    def __call__(self, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 image [3, H, W] and uint8 mask [H, W] to `(float [3, S, S], int64 [S, S])`."""
        image, mask = self.steps(tv_tensors.Image(sample[0]), tv_tensors.Mask(sample[1][None]))
        return self.normalise(image).as_subclass(Tensor), mask[0].as_subclass(Tensor).long()


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes of two to four emoji, drawn anew whenever one is read."""

    def __init__(self, drawings: EmojiSet, rows: Sequence[Sequence[int]], length: int, size: int) -> None:
        self.drawings, self.rows, self.length, self.size = drawings, rows, length, size
        self.label = torch.full((len(drawings),), BACKGROUND, dtype=torch.uint8)
        for number, own in enumerate(rows):
            self.label[list(own)] = number

    def __len__(self) -> int:
        """Return the number of scenes in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a uint8 image [3, S, S] and the class at each pixel, uint8 [S, S]."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        filled = [own for own in self.rows if len(own)]

        def one(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        chosen = [filled[one(len(filled))] for _ in range(2 + one(3))]
        rows = [own[one(len(own))] for own in chosen]
        scene = compose(self.drawings, rows, generator, self.size, (0.3, 0.55), overlap=0.15)
        mask = torch.full_like(scene.owner, BACKGROUND, dtype=torch.uint8)
        for number, thing in enumerate(scene.things):
            mask[scene.owner == number] = self.label[thing.row]
        return scene.image, mask


class SceneSegmentationData(SegmentationData):
    """Composed OpenMoji scenes: 16 kinds, the last four of which no training scene shows.

    Training scenes are of the training identities, every sixth of which is kept for validation; test scenes are of the
    held-out identities and of all kinds, as are those for validation.
    """

    def __init__(
        self,
        style: str = "openmoji",
        scenes: int = 1000,
        eval_scenes: int = 256,
        unseen: int = 4,
        image_size: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 32,
    ) -> None:
        """Args:
        style: `openmoji`, `noto` or `twemoji`.
        scenes: training scenes an epoch; each is new.
        eval_scenes: scenes for validation and for the test; always the same.
        unseen: kinds at the end of the list that are not trained on.
        image_size: height and width in pixels.
        batch_size: scenes a training step and process.
        num_workers: loading processes; the batches do not depend on it.
        seed: of the training scenes and their order.
        eval_batch_size: scenes a validation or test step.
        """
        super().__init__(batch_size, num_workers, seed, image_size, eval_batch_size)
        if not 0 <= unseen < len(KINDS):
            raise ConfigError(f"unseen is a number of kinds below {len(KINDS)}, got {unseen}")
        self.style, self.scenes, self.eval_scenes, self.unseen = style, scenes, eval_scenes, unseen
        self.classes = [spoken(kind) for kind in KINDS]

    def datasets(self, stage: str | None = None) -> None:
        """Set the three sets of scenes."""
        known, held_out = emoji(self.style, "train"), emoji(self.style, "test")
        train, val = [], []
        for kind in KINDS:
            own = torch.nonzero(known.sublabels == known.subcategories.index(kind)).flatten().tolist()
            val.append(own[::HELD_BACK])
            train.append([row for i, row in enumerate(own) if i % HELD_BACK])
        test = [
            torch.nonzero(held_out.sublabels == held_out.subcategories.index(kind)).flatten().tolist() for kind in KINDS
        ]
        seen = [own if i < len(KINDS) - self.unseen else [] for i, own in enumerate(train)]
        self.train_set = Scenes(known, seen, self.scenes, self.image_size)
        self.val_set = Scenes(known, val, self.eval_scenes, self.image_size)
        self.test_set = Scenes(held_out, test, self.eval_scenes, self.image_size)


class Masked(Dataset[tuple[Tensor, Tensor]]):
    """`images/<name>.jpg` with `masks/<name>.png`, a PNG of class numbers (grey or palette)."""

    def __init__(self, folder: Path, classes: int, background: int | None) -> None:
        if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
            raise DataError(f"{folder} has no folders `images` and `masks`")
        masks = {path.stem: path for path in sorted((folder / "masks").glob("*.png"))}
        self.pairs = [(path, masks.get(path.stem)) for path in sorted((folder / "images").iterdir()) if path.is_file()]
        alone = next((path for path, mask in self.pairs if mask is None), None)
        if alone is not None or not self.pairs:
            raise DataError(
                f"{alone} has no mask {folder / 'masks'}/{alone.stem}.png" if alone else f"{folder} is empty"
            )
        self.classes, self.background = classes, background

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a uint8 image [3, H, W] and class numbers, uint8 [H, W].

        Raises:
            DataError: the mask is of another size, or holds a number that is no class.
        """
        path, file = self.pairs[index]
        image = read(path)
        try:
            with Image.open(file) as stored:  # type: ignore[arg-type]
                mask = torch.from_numpy(np.array(stored, dtype=np.uint8))
        except (OSError, UnidentifiedImageError, ValueError, TypeError) as error:
            raise DataError(f"{file} cannot be read as a mask: {error}") from error
        if mask.dim() != 2 or tuple(mask.shape) != (image.height, image.width):
            raise DataError(
                f"{file} is {tuple(mask.shape)}, its image {path.name} {(image.height, image.width)}: expected one "
                "number a pixel and the same size"
            )
        if self.background is not None:
            mask[mask == self.background] = BACKGROUND
        wrong = mask[(mask >= self.classes) & (mask < BACKGROUND)]
        if len(wrong):
            raise DataError(f"{file} holds {int(wrong[0])}, the classes are 0 … {self.classes - 1} and 255 for none")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), mask


class FolderSegmentationData(SegmentationData):
    """`root/classes.txt` (a name a line) and `root/{train,val,test}/{images,masks}`, as ADE20K or VOC are laid out.

    The last `unseen` classes are for testing an open vocabulary: their pixels do not count in training.
    """

    def __init__(
        self,
        root: str,
        background: int | None = None,
        unseen: int = 0,
        image_size: int = 224,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 8,
    ) -> None:
        """Args:
        root: the folder.
        background: number in the masks that stands for no class; None if every pixel has one.
        unseen: classes at the end of the list that are not trained on.
        image_size: height and width that images and masks are resized to.
        batch_size: images a training step and process.
        num_workers: loading processes; the batches do not depend on it.
        seed: of the order.
        eval_batch_size: images a validation or test step.

        Raises:
            DataError: the list of classes is missing, empty or names one twice.
        """
        super().__init__(batch_size, num_workers, seed, image_size, eval_batch_size)
        self.root, self.background, self.unseen = Path(root), background, unseen
        file = self.root / "classes.txt"
        if not file.is_file():
            raise DataError(f"there is no {file}; expected a class name a line, in the order of their numbers")
        self.classes = [spoken(line.strip()) for line in file.read_text("utf-8").splitlines() if line.strip()]
        if len(set(self.classes)) < max(len(self.classes), 1) or len(self.classes) >= BACKGROUND:
            raise DataError(f"{file} must name 1 … {BACKGROUND - 1} different classes, got {len(self.classes)}")

    def datasets(self, stage: str | None = None) -> None:
        """Open the folders that are there; training needs `train`."""
        for name in ("train", "val", "test"):
            if (self.root / name).is_dir():
                setattr(self, f"{name}_set", Masked(self.root / name, len(self.classes), self.background))
