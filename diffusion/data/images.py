"""Your own images with captions, in aspect buckets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Literal, Unpack

import PIL
import torch
from PIL import Image, ImageColor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tf

from mmpeft.data.caption_sources import open_captions
from mmpeft.data.captioned import listed
from mmpeft.data.options import LoaderOptions
from mmpeft.data.sampling import EpochSampler, SizedDataset
from mmpeft.diffusion.data.album import Album
from mmpeft.diffusion.data.base import Sample, TextToImageData, as_sample, repeated, unique
from mmpeft.diffusion.data.buckets import BucketSampler, Size, bucket_sizes, crop, nearest_size
from mmpeft.diffusion.family import beginning
from mmpeft.diffusion.style.judge import Judge
from mmpeft.errors import ConfigError, DataError
from mmpeft.types import Fields

LOG = logging.getLogger(__name__)
VERSION = 2  # of the way from a file to pixels: another one is another key


class CaptionedImages(TextToImageData):
    """Images from a folder, tar shards or `datasets`, each cropped to the aspect bucket nearest to its own shape.

    A batch holds one bucket alone; see `Sample` for its names. With `crop: random` an image is another one each time:
    samples have no `key`, and no latents can be kept. With `mirror` each image has two keys, and two latents.
    """

    def __init__(
        self,
        root: str,
        prompt: str | None = None,
        image_column: str = "image",
        text_column: str = "text",
        prior_root: str | None = None,
        prior_prompt: str | None = None,
        val_root: str | None = None,
        test_root: str | None = None,
        other_prompts: Sequence[str] = (),
        evaluator: str | None = None,
        resolution: int | None = None,
        buckets: bool = True,
        crop: Literal["center", "random"] = "center",
        mirror: bool = False,
        upscale: bool = False,
        background: str | None = None,
        repeats: int = 1,
        batch_size: int = 1,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """
        Args:
            root: a folder of images with `metadata.jsonl` (`file_name`, `text`) or a .txt beside each, a .csv or .jsonl
                table, tar shards (`shards/*.tar`), or `datasets`' `<name>[:<split>]`, also a .parquet file.
            prompt: one for all images, in place of their captions; for subjects, `a photo of sks dog`.
            image_column: column of the images in a table or a data set.
            text_column: column of the captions, or field of a shard's .json.
            prior_root: images of what the subject is one of, named as `root` is. Each sample then has a `prior`, drawn
                from those whose shape is nearest to its bucket.
            prior_prompt: one for all of them; None for their captions.
            val_root: images of the style or subject that are not trained on, named as `root` is: cropped to the
                square, for the validation error and what is judged with each grid.
            test_root: images that neither trains nor chooses anything, for `mmpeft test`.
            other_prompts: prompts that do not ask for the style or subject, drawn in turn beside those of validation
                and
                test: what changed there was not meant to.
            evaluator: a repository or folder of transformers with an image-text pair, such as
                `openai/clip-vit-base-patch32`, that judges what is drawn; None for drawings without scores.
            resolution: side of the square, whose area the other buckets have; None for what the pipeline was made for.
            buckets: False to crop everything to the square.
            crop: where an image is cut that is longer than its bucket.
            mirror: show an image mirrored one time in two. Off because captions may say left and right.
            upscale: enlarge images that are smaller than their bucket, where the default is to refuse them.
            background: the colour behind transparent pixels; None to refuse images that have some.
            repeats: how often an epoch shows each image.
            batch_size: images a training step and process.
            options: those of `DataModule`; `seed` is of the random crops and the prior images too.

        Raises:
            ConfigError: an option is unknown or contradicts another. `setup` checks the images.
        """
        super().__init__(resolution, repeats, batch_size=batch_size, **options)
        if prior_prompt is not None and prior_root is None:
            raise ConfigError("prior_prompt is said of the images in prior_root; give that, or leave both out")
        if crop not in ("center", "random"):
            raise ConfigError(f"crop is center or random, got {crop!r}")
        if background is not None:
            try:
                ImageColor.getrgb(background)
            except ValueError as error:
                raise ConfigError(f"background is a colour such as white or #ffffff, got {background!r}") from error
        if (other_prompts or evaluator) and not (val_root or test_root):
            raise ConfigError("other_prompts and evaluator are for images in val_root or test_root; give one of these")
        self.sources = {
            "train": (root, prompt),
            "prior": (prior_root, prior_prompt),
            "val": (val_root, prompt),
            "test": (test_root, prompt),
        }
        self.other_prompts, self.evaluator = list(other_prompts), evaluator
        self.columns, self.background = (image_column, text_column), background
        self.buckets, self.random, self.mirror, self.upscale = buckets, crop == "random", mirror, upscale
        self.albums: dict[str, Album] = {}
        self.bucket_of: list[int] = []  # the bucket of each sample of an epoch

    def datasets(self, stage: str | None = None) -> None:
        """Open and check all images, once.

        Raises:
            DataError: captions or images are missing, damaged or of no use.
        """
        for name, (source, prompt) in self.sources.items():
            if source is not None and name not in self.albums:
                self.albums[name] = Album(open_captions(source, *self.columns, prompt), self.background)

    def cut(self, resolution: int, multiple: int) -> None:
        if not self.albums:
            return
        square = [(resolution, resolution)]
        sizes = bucket_sizes(resolution, multiple) if self.buckets else square
        sets = {
            name: Crops(self.albums[name], sizes, self.random, self.mirror, self.upscale)
            for name in ("train", "prior")
            if name in self.albums
        }
        train = sets["train"]
        self.bucket_of = train.buckets * self.repeats
        self.train_set = repeated(WithPrior(train, sets["prior"]) if "prior" in sets else train, self.repeats)
        for name in {"val", "test"} & self.albums.keys():
            held = Crops(self.albums[name], square, False, False, self.upscale)
            setattr(self, f"{name}_set", WithOthers(held, self.other_prompts))

    @property
    def has_prior(self) -> bool:
        """Whether samples have a `prior`."""
        return self.sources["prior"][0] is not None

    @property
    def samples(self) -> int:
        self.datasets()
        return len(self.albums["train"])

    def prompts(self) -> list[str]:
        self.datasets()
        said = (prompt for album in self.albums.values() for prompt in album.prompts)
        return unique((*said, *self.other_prompts))

    def where(self, prompt: str) -> str:
        """What an error calls a prompt: the image it is said of, if it is of one."""
        places = (a.found.where(i) for a in self.albums.values() for i, said in enumerate(a.prompts) if said == prompt)
        return next(places, beginning(prompt))

    def judge(self) -> Judge | None:
        """The evaluator, if one is named."""
        if self.evaluator is None:
            return None
        from mmpeft.diffusion.style.pair_judge import PairJudge

        return PairJudge(self.evaluator)

    def _sampler(self, dataset: SizedDataset, batch_size: int, *, shuffle: bool) -> EpochSampler:
        if not shuffle:
            return super()._sampler(dataset, batch_size, shuffle=False)
        replicas, rank = self._replicas()
        return BucketSampler(self.bucket_of, batch_size, seed=self.seed, num_replicas=replicas, rank=rank)


class Crops(Dataset[Sample]):
    """The images of an album, each cut to the nearest of some sizes."""

    def __init__(self, album: Album, sizes: Sequence[Size], random: bool, mirror: bool, upscale: bool) -> None:
        """Raises DataError: an image would have to be enlarged, and `upscale` is false."""
        self.album, self.sizes, self.random, self.mirror = album, list(sizes), random, mirror
        self.buckets = [nearest_size(facts.size, sizes) for facts in album.facts]
        small, thin = [], []
        for index, (facts, bucket) in enumerate(zip(album.facts, self.buckets)):
            found = crop(facts.size, sizes[bucket])
            left, top, right, bottom = found.box
            if found.scale > 1:
                (height, width), (high, wide) = facts.size, sizes[bucket]
                small.append(f"{album.found.where(index)}: {height}×{width} for {high}×{wide}")
            if (right - left) * (bottom - top) < facts.size[0] * facts.size[1] / 2:
                thin.append(album.found.where(index))
        if small and not upscale:
            raise DataError(
                f"{len(small)} of {len(album)} images are smaller (height × width) than what they are needed for: "
                f"{listed(small)}; use larger images or a lower resolution, or set upscale: true"
            )
        if thin:
            LOG.warning("more than half is cut off, so that captions may not fit: %s", listed(thin))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.album)

    def __getitem__(self, index: int) -> Sample:
        """Return one sample; what is random about it comes from torch's global generator."""
        facts, bucket = self.album.facts[index], self.sizes[self.buckets[index]]
        found = crop(facts.size, bucket, float(torch.rand(())) if self.random else 0.5)
        mirrored = self.mirror and bool(torch.rand(()) < 0.5)
        picture = self.album.image(index).resize(bucket[::-1], Image.Resampling.LANCZOS, found.box)
        pixels = tf.pil_to_tensor(picture)
        top, left = found.corner
        if mirrored:
            pixels = pixels.flip(-1)
            left = round(facts.size[1] * found.scale) - bucket[1] - left
        key = None
        if not self.random:
            known = (VERSION, PIL.__version__, facts.digest, bucket, found.box, mirrored, self.album.background)
            key = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
        return as_sample(pixels, self.album.prompts[index], facts.size, (top, left), key)


class WithPrior(Dataset[Sample]):
    """Crops, each with a prior image."""

    def __init__(self, crops: Crops, prior: Crops) -> None:
        self.crops, self.prior, self.rows = crops, prior, _alike(crops, prior)

    def __len__(self) -> int:
        """Return the number of crops."""
        return len(self.crops)

    def __getitem__(self, index: int) -> Sample:
        """Return one sample; `prior` is drawn from torch's global generator."""
        rows = self.rows[self.crops.buckets[index]]
        return {**self.crops[index], "prior": self.prior[rows[int(torch.randint(len(rows), ()))]]}


class WithOthers(Dataset[Fields]):
    """Crops, each with one of some other prompts (`plain`) if there are any."""

    def __init__(self, crops: Crops, prompts: Sequence[str]) -> None:
        self.crops, self.prompts = crops, prompts

    def __len__(self) -> int:
        """Return the number of crops."""
        return len(self.crops)

    def __getitem__(self, index: int) -> Fields:
        """Return one sample."""
        return {**self.crops[index], **({"plain": self.prompts[index % len(self.prompts)]} if self.prompts else {})}


def _alike(crops: Crops, prior: Crops) -> dict[int, list[int]]:
    """For each bucket the prior images of one bucket, the nearest: so that they too are of one size in a batch."""
    own = sorted(set(prior.buckets))
    sizes = [prior.sizes[bucket] for bucket in own]
    chosen = {bucket: own[nearest_size(crops.sizes[bucket], sizes)] for bucket in set(crops.buckets)}
    unused = sum(bucket not in chosen.values() for bucket in prior.buckets)
    if unused:
        LOG.warning(
            "%d of %d prior images are never drawn: no training image is of a shape like theirs", unused, len(prior)
        )
    return {bucket: [row for row, b in enumerate(prior.buckets) if b == like] for bucket, like in chosen.items()}
