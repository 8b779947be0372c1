"""Scenes of known depth: emoji of one size at different distances, the nearer in front of the further."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from mmpeft.data.contract import Preprocessed, Preprocessing, Resizing
from mmpeft.data.files import ImageFiles
from mmpeft.data.inputs import Inputs
from mmpeft.data.loading import DataModule
from mmpeft.data.options import LoaderOptions
from mmpeft.data.sampling import hash_seed
from mmpeft.data.transforms import OfImage, evaluation
from mmpeft.embedded import emoji
from mmpeft.embedded.emoji import EmojiSet
from mmpeft.embedded.scenes import compose
from mmpeft.errors import ConfigError

NEAREST, WALL = 0.6, 5.0
"""Side of an emoji at depth 1 as a share of the scene's, and the depth of the background."""


class DepthScenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes `(image uint8 [3, S, S], depth float [1, S, S])`, new ones each time, or by `key` always the same."""

    def __init__(self, drawings: EmojiSet, length: int, size: int, key: int | None = None) -> None:
        self.drawings, self.length, self.size, self.key = drawings, length, size, key

    def __len__(self) -> int:
        """Return the number of scenes in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one scene: the depth of an emoji is `NEAREST · S / side`, that of the background `WALL`."""
        start = int(torch.randint(2**62, ())) if self.key is None else hash_seed(self.key, index)
        generator = torch.Generator().manual_seed(start)
        count = 2 + int(torch.randint(4, (), generator=generator))
        rows = torch.randint(len(self.drawings), (count,), generator=generator).tolist()
        scene = compose(self.drawings, rows, generator, self.size, (0.15, NEAREST), overlap=0.5, by_size=True)
        depth = torch.full((1, self.size, self.size), WALL)
        for number, thing in enumerate(scene.things):
            depth[0, scene.owner == number] = NEAREST * self.size / (thing.box[2] - thing.box[0])
        return scene.image, depth


class SceneDepthData(Preprocessed, DataModule):
    """Composed scenes of emoji with the depth of each pixel.

    Batches are `(images float [B, 3, S, S] normalised, depth float [B, 1, S, S])`; to predict, `(images, names)`.

    Training scenes are of the training identities, those for validation and the test of their own.
    """

    small_batch = 32

    def __init__(
        self,
        style: str = "openmoji",
        scenes: int = 1000,
        eval_scenes: int = 256,
        image_size: int = 128,
        batch_size: int = 16,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """
        Args:
            style: `openmoji`, `noto` or `twemoji`.
            scenes: training scenes an epoch; each is new.
            eval_scenes: scenes for validation and for the test, the same whatever the seed. The test's are predicted.
            image_size: height and width in pixels of the scenes, which the backbone is given as they are.
            batch_size: scenes a training step and process.
            options: those of `DataModule`.

        Raises:
            ConfigError: there are no scenes.
        """
        super().__init__(batch_size=batch_size, **options)
        if min(scenes, eval_scenes, image_size) < 1:
            raise ConfigError(
                f"scenes, eval_scenes and image_size are numbers >= 1, got {scenes}, {eval_scenes} and {image_size}"
            )
        self.style, self.scenes, self.eval_scenes, self.image_size = style, scenes, eval_scenes, image_size
        self.preprocess(Preprocessing((image_size, image_size)))

    def preprocess(self, wanted: Preprocessing) -> None:
        normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(wanted.mean, wanted.std)])

        def prepared(sample: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            return normalise(sample[0]), sample[1]

        self.train_transform = self.eval_transform = prepared
        self.of_pictures = OfImage(evaluation(wanted.size, wanted.mean, wanted.std, Resizing()))

    def take(self, inputs: Inputs) -> None:
        """Predict pictures, resized to the scenes' size."""
        named = inputs.named()
        self.predict_set = ImageFiles(list(named.values()), list(named))
        self.predict_transform = self.of_pictures

    def datasets(self, stage: str | None = None) -> None:
        train, val, test = (emoji(self.style, split) for split in ("train", "val", "test"))
        self.train_set = DepthScenes(train, self.scenes, self.image_size)
        self.val_set = DepthScenes(val, self.eval_scenes, self.image_size, key=1)
        self.test_set = tested = DepthScenes(test, self.eval_scenes, self.image_size, key=2)
        self.predict_set = [(tested[i][0], f"scene_{i:04d}") for i in range(len(tested))]
