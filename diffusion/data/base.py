"""What the data modules of text-to-image tuning share: their samples, and what a task tells them and asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NotRequired, Protocol, TypedDict, Unpack, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from mmpeft.data.inputs import Inputs, file_names
from mmpeft.data.loading import DataModule
from mmpeft.data.options import LoadingOptions
from mmpeft.data.sampling import ResumableLoader
from mmpeft.diffusion.data.buckets import Size
from mmpeft.errors import ConfigError

USUAL = 8  # pixels a latent


class Sample(TypedDict):
    """One image with its prompt; a batch has the same names, tensors stacked and texts in lists."""

    image: Tensor  # float [3, H, W] in [−1, 1]
    prompt: str
    original_size: Tensor  # int64 [2], height and width before resizing
    crop: Tensor  # int64 [2], top and left of the crop in the resized image
    target_size: Tensor  # int64 [2], H and W
    key: NotRequired[str]  # names the pixels of `image`; absent where they are new each time
    prior: NotRequired[Sample]  # an image for prior preservation


def as_sample(image: Tensor, prompt: str, original: Size, corner: Size, key: str | None) -> Sample:
    """A sample from uint8 pixels [3, H, W]."""
    sample: Sample = {
        "image": image.float() / 127.5 - 1,
        "prompt": prompt,
        "original_size": torch.tensor(original),
        "crop": torch.tensor(corner),
        "target_size": torch.tensor(image.shape[-2:]),
    }
    if key is not None:
        sample["key"] = key
    return sample


@runtime_checkable
class HasPrompts(Protocol):
    """Data of images with prompts, which a task tells the side of its images and what sides are multiples of."""

    resolution: int | None

    @property
    def has_prior(self) -> bool: ...

    def configure(self, resolution: int, multiple: int) -> None: ...

    def prompts(self) -> Sequence[str]: ...


class TextToImageData(DataModule):
    """Batches of `Sample`s: one size a batch, a prompt for each image, and what a cache of latents needs.

    A sample's `key` is a hash of the image's content and of all that was done to it, so whatever an encoder made of it
    may be kept under that key, also for other runs. Text features may be kept under the prompt itself.
    """

    multiple: int | None = None  # what sides are multiples of, once the task has said so

    def __init__(
        self,
        resolution: int | None,
        repeats: int,
        **options: Unpack[LoadingOptions],
    ) -> None:
        super().__init__(**options)
        if repeats < 1:
            raise ConfigError(f"repeats is how often an epoch shows each image, a number >= 1, got {repeats}")
        if resolution is not None and resolution < 1:
            raise ConfigError(
                f"resolution is a number of pixels >= 1, got {resolution}; leave it out for the pipeline's"
            )
        self.resolution, self.repeats = resolution, repeats

    def configure(self, resolution: int, multiple: int) -> None:
        """Take the side in pixels from the pipeline where the user has given none, and what sides are multiples of.

        Raises:
            ConfigError: the resolution in use is no such multiple.
        """
        self.resolution, self.multiple = self.resolution or resolution, multiple
        if self.resolution % multiple:
            below = self.resolution // multiple * multiple
            raise ConfigError(
                f"resolution is a multiple of {multiple}, got {self.resolution}; the next ones are "
                f"{below or multiple} and {below + multiple}"
            )
        self.cut(self.resolution, multiple)

    def setup(self, stage: str | None = None) -> None:
        """Lightning's hook: open and check the images; they are cut once the task has said for what."""
        super().setup(stage)
        if self.resolution is not None and self.multiple is not None:
            self.cut(self.resolution, self.multiple)

    def take(self, inputs: Inputs) -> None:
        """Draw the texts that were given."""
        prompts = [*inputs.given, *inputs.texts]
        self.predict_set = [
            {"prompt": prompt, "name": name, "seed": seed}
            for seed, (prompt, name) in enumerate(zip(prompts, file_names(prompts)))
        ]

    def cut(self, resolution: int, multiple: int) -> None:
        """Make the sets for a resolution, where the images are open."""
        raise NotImplementedError

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled, resumable training batches."""
        self._configured()
        return super().train_dataloader()

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the validation batches in order, or an empty list when there is no validation set."""
        self._configured()
        return super().val_dataloader()

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the test batches in order."""
        self._configured()
        return super().test_dataloader()

    def _configured(self) -> None:
        """Without a task that configures, sides are what the usual autoencoder needs."""
        if self.resolution is None:
            raise ConfigError(
                f"{type(self).__name__} knows no resolution: give one, such as resolution=512, or let the task "
                "configure it"
            )
        if self.multiple is None:
            self.configure(self.resolution, USUAL)

    @property
    def has_prior(self) -> bool:
        """Whether samples have a `prior`."""
        return False

    @property
    def samples(self) -> int:
        """Number of training images with a prompt, each counted once."""
        raise NotImplementedError

    def prompts(self) -> list[str]:
        """Every prompt that a sample may have, each once: to check their lengths, and to encode them beforehand."""
        raise NotImplementedError


def repeated(dataset: Dataset[Sample], repeats: int) -> Subset[Sample]:
    """A data set as often as an epoch shows it."""
    return Subset(dataset, list(range(len(dataset))) * repeats)  # type: ignore[arg-type]  # our sets have a length


def unique(prompts: Iterable[str]) -> list[str]:
    """Each prompt once, in order."""
    return list(dict.fromkeys(prompts))
