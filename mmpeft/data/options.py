"""Options that data modules share: typed where a constructor passes them on, explained where the base takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from mmpeft.data.contract import Resize

Augment = Literal["none", "light", "strong"]


class LoaderOptions(TypedDict, total=False):
    """Options of `DataModule`, which explains them, but for `batch_size`."""

    num_workers: int
    seed: int
    eval_batch_size: int | None


class LoadingOptions(LoaderOptions, total=False):
    """Options of `DataModule`."""

    batch_size: int


class SizeOptions(TypedDict, total=False):
    """Options of `ImageData`, which explains them: what is the backbone's unless given."""

    image_size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None


class LookOptions(SizeOptions, total=False):
    """Options of `ImageData` beside those of `DataModule`."""

    augment: Augment
    resize: Resize | None


class UnbatchedImageOptions(LoaderOptions, LookOptions, total=False):
    """Options of `ImageData`, but for `batch_size`."""


class ImageOptions(LoadingOptions, LookOptions, total=False):
    """Options of `ImageData`."""


def inherit_options(cls: type) -> None:
    """Let a parser read the options that a constructor passes on from the base that takes them.

    jsonargparse follows `super().__init__(**options)` to their types, texts and defaults, unless `**options` is
    annotated as `Unpack[…]`, which has no defaults. The annotation stays in the source, for type checkers.
    """
    constructor = cls.__dict__.get("__init__")
    for name, annotation in list(getattr(constructor, "__annotations__", {}).items()):
        if "Unpack[" in str(annotation):
            del constructor.__annotations__[name]
