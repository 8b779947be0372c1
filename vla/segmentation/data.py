"""Images with a class at each pixel: composed scenes of emoji, and folders of images and index masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Unpack, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from mmpeft.data.contract import HasClasses, Preprocessed, Preprocessing
from mmpeft.data.inputs import Inputs
from mmpeft.data.loading import DataModule
from mmpeft.data.options import LoaderOptions, LoadingOptions
from mmpeft.data.pictures import read
from mmpeft.data.pixels import pixels
from mmpeft.data.sampling import hash_seed
from mmpeft.data.transforms import OF_TENSORS
from mmpeft.embedded import emoji, spoken
from mmpeft.embedded.emoji import EmojiSet
from mmpeft.embedded.scenes import compose
from mmpeft.errors import ConfigError

IGNORED, BACKGROUND = 255, 254
KINDS = (
    "country-flag", "animal-mammal", "clothing", "transport-ground", "food-prepared", "sky & weather", "person-role",
    "alphanum", "time", "food-fruit", "place-building", "geometric", "animal-bird", "heart", "game", "face-concerned",
)  # fmt: skip
HELD_BACK = 6
"""Every sixth training identity of a kind is for validation."""


@runtime_checkable
class HasUnseenClasses(HasClasses, Protocol):
    """Data whose last `unseen` classes no training image shows."""

    unseen: int


class SegmentationData(Preprocessed, DataModule):
    """Batches `(images float [B, 3, S, S] normalised, target int64 [B, S, S])`; to predict,
    `(images, names, heights and widths int64 [B, 2])`.

    Target holds class numbers, 254 for background and 255 for what does not count. `classes` are all names, the last
    `unseen` of which no training image shows.
    """

    classes: list[str]
    unseen = 0
    mirror = False  # whether training images are mirrored at random

    small_batch = 32

    def __init__(self, image_size: int, **options: Unpack[LoadingOptions]) -> None:
        super().__init__(**options)
        if image_size < 1:
            raise ConfigError(f"image_size is a number of pixels >= 1, got {image_size}")
        self.preprocess(Preprocessing((image_size, image_size)))

    def preprocess(self, wanted: Preprocessing) -> None:
        """Take size and normalisation of the backbone."""
        self.train_transform = Prepared(wanted, self.mirror)
        self.eval_transform = Prepared(wanted)
        self.predict_transform = self.eval_transform.alone

    def take(self, inputs: Inputs) -> None:
        """Predict pictures, each at its own size."""
        named = inputs.named()
        paths = list(named.values())
        self.predict_set = NamedPictures(lambda i: pixels(read(paths[i])), list(named))


class Prepared:
    """Resize image and mask, the mask without mixing classes; scale and normalise the image.

    All of the image is shown, whatever its shape: what a crop leaves out could not be segmented.
    """

    def __init__(self, wanted: Preprocessing, mirror: bool = False) -> None:
        how = InterpolationMode(wanted.resizing.interpolation)
        how = how if how in OF_TENSORS else InterpolationMode.BICUBIC
        steps: list[v2.Transform] = [v2.Resize(list(wanted.size), interpolation=how, antialias=True)]
        steps += [v2.RandomHorizontalFlip()] if mirror else []
        self.steps = v2.Compose([*steps, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])
        self.normalise = v2.Normalize(list(wanted.mean), list(wanted.std))

    def __call__(self, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 image [3, H, W] and uint8 mask [H, W] to `(float [3, S, S], int64 [S, S])`."""
        image, mask = self.steps(tv_tensors.Image(sample[0]), tv_tensors.Mask(sample[1][None]))
        return self.normalise(image).as_subclass(Tensor), mask[0].as_subclass(Tensor).long()

    def alone(self, sample: tuple[Tensor, str]) -> tuple[Tensor, str, Tensor]:
        """uint8 image [3, H, W] and its name to `(float [3, S, S], name, int64 [2] of H and W)`."""
        image, name = sample
        done = self.normalise(self.steps(tv_tensors.Image(image))).as_subclass(Tensor)
        return done, name, torch.tensor(image.shape[-2:])


class NamedPictures(Dataset[tuple[Tensor, str]]):
    """Images to predict, with a name for each; masks, if there are any, are left out."""

    def __init__(self, images: Callable[[int], Tensor], names: Sequence[str]) -> None:
        self.images, self.names = images, names

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return a uint8 image [3, H, W] and its name."""
        return self.images(index), self.names[index]


class MaskedScenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes of two to four emoji; with a `key` scene i is always the same, without one it is new whenever read."""

    def __init__(
        self, drawings: EmojiSet, rows: Sequence[Sequence[int]], length: int, size: int, key: int | None = None
    ) -> None:
        self.drawings, self.rows, self.length, self.size, self.key = drawings, rows, length, size, key
        self.label = torch.full((len(drawings),), BACKGROUND, dtype=torch.uint8)
        for number, own in enumerate(rows):
            self.label[list(own)] = number

    def __len__(self) -> int:
        """Return the number of scenes in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a uint8 image [3, S, S] and the class at each pixel, uint8 [S, S]."""
        start = int(torch.randint(2**62, ())) if self.key is None else hash_seed(self.key, index)
        generator = torch.Generator().manual_seed(start)
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
        **options: Unpack[LoaderOptions],
    ) -> None:
        """
        Args:
            style: `openmoji`, `noto` or `twemoji`.
            scenes: training scenes an epoch; each is new.
            eval_scenes: scenes for validation and for the test; the same whatever the seed. The test's are predicted
                too.
            unseen: kinds at the end of the list that are not trained on.
            image_size: height and width of a scene in pixels; it is resized to what the backbone takes.
            batch_size: scenes a training step and process.
            options: those of `DataModule`.

        Raises:
            ConfigError: no kind is left to train on, or there are no scenes.
        """
        super().__init__(image_size, batch_size=batch_size, **options)
        if not 0 <= unseen < len(KINDS):
            raise ConfigError(f"unseen is a number of kinds below {len(KINDS)}, got {unseen}")
        if min(scenes, eval_scenes) < 1:
            raise ConfigError(f"scenes and eval_scenes are numbers >= 1, got {scenes} and {eval_scenes}")
        self.side = image_size
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
        self.train_set = MaskedScenes(known, seen, self.scenes, self.side)
        self.val_set = MaskedScenes(known, val, self.eval_scenes, self.side, key=1)
        self.test_set = tested = MaskedScenes(held_out, test, self.eval_scenes, self.side, key=2)
        self.predict_set = NamedPictures(lambda i: tested[i][0], [f"scene_{i:04d}" for i in range(len(tested))])
