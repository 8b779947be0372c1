"""What a task and its data agree on: what a backbone wants of its inputs, and what data know of themselves."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from mmpeft.errors import ConfigError

Resize = Literal["squash", "shortest", "longest"]


class Resizing(NamedTuple):
    """How a picture of any shape is brought to a backbone's size when it is evaluated."""

    mode: Resize = "squash"
    """`squash` distorts; `shortest` fills the size and crops the middle; `longest` shows all, with borders."""
    interpolation: str = "bicubic"
    share: float = 1.0
    """Of the resized picture's side, what is left by the crop: timm's `crop_pct`."""
    fill: int | tuple[int, ...] = 0
    """Grey or colour of the borders, 0 … 255."""


class _Normalised(NamedTuple):
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Preprocessing(_Normalised):
    """What a backbone wants of its images: height and width in pixels, and mean and deviation of channels in [0, 1].

    These three are what it unpacks to. Beside them it says how pictures of another shape are evaluated, how many
    channels there are, and whether the backbone takes no other size.
    """

    resizing: Resizing
    channels: int
    fixed: bool

    def __new__(
        cls,
        size: tuple[int, int],
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        resizing: Resizing = Resizing(),  # noqa: B008 - it is immutable
        channels: int = 3,
        fixed: bool = False,
    ) -> Self:
        made = super().__new__(cls, size, mean, std)
        made.resizing, made.channels, made.fixed = resizing, channels, fixed
        return made

    def restore(self, images: Tensor) -> Tensor:
        """Images [..., C, H, W] as they were before normalisation, in [0, 1]."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return (images.float() * std + mean).clamp(0, 1)


class Preprocessed:
    """Data that prepare their images as the backbone wants them; a subclass says how in `preprocess`."""

    def configure(self, preprocessing: Preprocessing | int | Sequence[int], *former: Sequence[float]) -> None:
        """Take what the backbone wants; the task calls it, before or after `setup`.

        The former three arguments `size, mean, std` are understood as well.
        """
        if not isinstance(preprocessing, Preprocessing):
            warnings.warn("configure is given one Preprocessing now", DeprecationWarning, stacklevel=2)
            side = preprocessing if isinstance(preprocessing, int) else preprocessing[-1]
            mean, std = former
            preprocessing = Preprocessing((side, side), tuple(mean), tuple(std))
        if preprocessing.channels != 3:
            raise ConfigError(
                f"the backbone takes {preprocessing.channels} channels; {type(self).__name__} gives RGB, 3 of them, "
                "equal ones for grey pictures. Leave in_chans out, or bring your own data module"
            )
        self.preprocess(preprocessing)

    def preprocess(self, wanted: Preprocessing) -> None:
        """Make the transforms for what a backbone wants."""
        raise NotImplementedError


@runtime_checkable
class HasClasses(Protocol):
    """Data that name what their labels stand for."""

    classes: Sequence[str]


def configure(data: object, preprocessing: Preprocessing) -> None:
    """Tell data what the backbone wants; data without `configure` know themselves."""
    own = getattr(data, "configure", None)
    if own is None:
        return
    needed = [
        p for p in inspect.signature(own).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    if len(needed) == 3:
        former = f"{type(data).__name__}.configure(image_size, mean, std) is given one Preprocessing now"
        warnings.warn(former, DeprecationWarning, stacklevel=2)
        own(*preprocessing)
    else:
        own(preprocessing)


def expected(data: object, contract: type, task: str) -> None:
    """Raise unless data have what a task's contract names.

    Raises:
        ConfigError: which attributes are missing.
    """
    named = (vars(cls) for cls in contract.__mro__ if getattr(cls, "_is_protocol", False) and cls is not Protocol)
    wanted = {n for body in named for n in (*body.get("__annotations__", {}), *body) if not n.startswith("_")}
    names = sorted(name for name in wanted if not hasattr(data, name))
    if names:
        raise ConfigError(
            f"{task} needs data with {', '.join(f'`{name}`' for name in names)}, which {type(data).__name__} has not; "
            f"{contract.__name__} says what they are"
        )
