"""Emoji as a data set: the same 1906 identities drawn in three styles, with names, keywords and categories.

**The split** is by identity and the same for every style, so that an emoji held out in one style is held out in all.
Emoji that differ only in gender or direction, all families, and emoji with identical pixels in any style (the flags of
Norway and Svalbard) are kin and stay together, so that no test drawing is seen in training. Within each category the
groups of kin are ordered by the SHA-256 of their first code-point sequence; in that order a group goes to test while it
fits in one fifth of the category, else to val while it fits in 8 %, else to train. Pretraining of the embedded
backbones uses split "train" of Noto and Twemoji only; OpenMoji is the style they never saw.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.types import Json

STYLES = ("noto", "openmoji", "twemoji")
SPLITS = ("train", "val", "test", "all")
TEST_SHARE, VAL_SHARE = 0.2, 0.08
NATIVE = 64
COLUMNS = 48


@dataclass(frozen=True, eq=False)
class EmojiSet(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Emoji of one style and split; a map-style data set of `(uint8 RGBA [4, size, size], label)`."""

    style: str
    split: str
    images: Tensor  # uint8 [n, 4, size, size], RGBA with straight (not premultiplied) alpha
    labels: Tensor  # int64 [n], index into `classes`
    classes: list[str]  # the nine categories, sorted
    sublabels: Tensor  # int64 [n], index into `subcategories`
    subcategories: list[str]
    identity: Tensor  # int64 [n], which emoji: the same number in every style and split
    unified: list[str]  # [n] code points, "1F468-200D-1F33E"
    names: list[str]  # [n]
    keywords: list[list[str]]  # [n] short names, the most usual one first

    def __len__(self) -> int:
        """Return the number of emoji."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return `(uint8 RGBA [4, size, size], category index)`."""
        return self.images[index], int(self.labels[index])

    def rgb(self, background: Sequence[int] = (255, 255, 255)) -> Tensor:
        """Composite every emoji on one colour.

        Args:
            background: three integers in 0..255.

        Returns:
            uint8 `[n, 3, size, size]`.

        Raises:
            ConfigError: `background` is not three integers in 0..255.
        """
        if len(background) != 3 or any(not 0 <= channel <= 255 for channel in background):
            raise ConfigError(
                f"Expected `background` to be three integers in 0..255, but got {tuple(background)!r}; "
                "white is (255, 255, 255)."
            )
        return composite(self.images, torch.tensor(list(background), dtype=torch.uint8))


def composite(rgba: Tensor, background: Tensor) -> Tensor:
    """Lay RGBA over a background: `out = alpha * rgb + (1 - alpha) * background`.

    Args:
        rgba: uint8 `[..., 4, H, W]`, straight alpha.
        background: uint8 `[3]` (one colour) or anything that broadcasts against `[..., 3, H, W]`.

    Returns:
        uint8 `[..., 3, H, W]`.
    """
    if background.ndim == 1:
        background = background[:, None, None]
    colour, alpha = rgba[..., :3, :, :].float(), rgba[..., 3:, :, :].float() / 255
    return (colour * alpha + background.float() * (1 - alpha)).round().to(torch.uint8)


def emoji(style: str = "openmoji", split: str = "train", size: int = NATIVE) -> EmojiSet:
    """Load the emoji of one drawing style.

    Args:
        style: "noto", "twemoji" or "openmoji".
        split: "train", "val", "test" or "all"; see the module's text for the rule.
        size: height and width in pixels; other than 64 means resized with antialiasing in premultiplied colour.

    Returns:
        A set that owns its tensors: changing them changes no other set.

    Raises:
        ConfigError: the style, split or size is unknown.
        DataError: the package data are missing or damaged.
    """
    if style not in STYLES:
        raise ConfigError(f"Expected `style` to be one of {STYLES}, but got {style!r}.{nearest(str(style), STYLES)}")
    if split not in SPLITS:
        raise ConfigError(f"Expected `split` to be one of {SPLITS}, but got {split!r}.{nearest(str(split), SPLITS)}")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 1024:
        raise ConfigError(f"Expected `size` to be an integer in 1..1024 pixels, but got {size!r}; try 32, 64 or 224.")
    index = _index()
    rows = _splits()[split]
    keep = torch.tensor(rows)
    return EmojiSet(
        style=style,
        split=split,
        images=_resize(_drawings(style)[keep], size),
        labels=torch.tensor(index["labels"])[keep],
        classes=list(index["classes"]),
        sublabels=torch.tensor(index["sublabels"])[keep],
        subcategories=list(index["subcategories"]),
        identity=keep,
        unified=[index["unified"][i] for i in rows],
        names=[index["names"][i] for i in rows],
        keywords=[list(index["keywords"][i]) for i in rows],
    )


def spoken(label: str) -> str:
    """A name, keyword, subcategory or category as words: `animal-mammal` is `animal mammal`."""
    return label.replace("-", " ").replace("_", " ").replace("&", "and").lower()


@cache
def _index() -> Json:
    """Read the table of names and categories."""
    try:
        index: Json = json.loads((files("mmpeft.embedded") / "data" / "emoji.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"The package data of mmpeft.embedded are missing ({error}); reinstall mmpeft.") from error
    return index


@cache
def _drawings(style: str) -> Tensor:
    """Decode the sheets of a style once: uint8 `[1906, 4, 64, 64]`. Callers index it, which copies."""
    parts = []
    for k, count in enumerate(_index()["sheets"][style]):
        name = f"{style}-{k}.webp"
        try:
            with (files("mmpeft.embedded") / "data" / name).open("rb") as stream, Image.open(stream) as image:
                sheet = np.asarray(image.convert("RGBA"))
        except OSError as error:
            raise DataError(f"The emoji sheet {name} cannot be read ({error}); reinstall mmpeft.") from error
        expected = (-(-count // COLUMNS) * NATIVE, COLUMNS * NATIVE, 4)
        if sheet.shape != expected:
            raise DataError(f"Expected emoji sheet {name} of shape {expected}, got {sheet.shape}; reinstall mmpeft.")
        cells = sheet.reshape(-1, NATIVE, COLUMNS, NATIVE, 4).transpose(0, 2, 4, 1, 3)
        parts.append(torch.from_numpy(cells.reshape(-1, 4, NATIVE, NATIVE)[:count].copy()))
    return torch.cat(parts)


@cache
def _splits() -> dict[str, list[int]]:
    """Return the sorted identities of every split."""
    index = _index()
    groups: dict[int, list[int]] = defaultdict(list)
    for i, kin in enumerate(index["kin"]):
        groups[kin].append(i)
    order = sorted(groups, key=lambda kin: hashlib.sha256(index["unified"][kin].encode()).digest())
    total: Counter[tuple[str, int]] = Counter(index["labels"])
    out: dict[str, list[int]] = {"train": [], "val": [], "test": [], "all": list(range(len(index["kin"])))}
    taken: Counter[tuple[str, int]] = Counter()
    for kin in order:
        members, label = groups[kin], index["labels"][kin]
        for split, share in (("test", TEST_SHARE), ("val", VAL_SHARE), ("train", 1.0)):
            if taken[split, label] + len(members) <= round(share * total[label]):
                taken[split, label] += len(members)
                out[split] += members
                break
    return {split: sorted(rows) for split, rows in out.items()}


def _resize(rgba: Tensor, size: int) -> Tensor:
    """Resize uint8 `[n, 4, H, W]` in premultiplied colour, so that invisible pixels do not bleed into the edges."""
    if rgba.shape[-1] == size:
        return rgba
    out = torch.empty(len(rgba), 4, size, size, dtype=torch.uint8)
    for start in range(0, len(rgba), 256):  # bounds the float copies to a few megabytes
        part = rgba[start : start + 256].float()
        alpha = part[:, 3:] / 255
        both = torch.cat([part[:, :3] * alpha, part[:, 3:]], dim=1)
        both = interpolate(both, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        colour = both[:, :3] / (both[:, 3:] / 255).clamp_min(1e-6)
        out[start : start + 256] = torch.cat([colour, both[:, 3:]], dim=1).round().clamp_(0, 255).to(torch.uint8)
    out[:, :3].masked_fill_(out[:, 3:] == 0, 0)
    return out
