"""Scenes composed of emoji: exact masks, places and colours, for tasks that look at more than one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from mmpeft.embedded.emoji import EmojiSet, composite
from mmpeft.errors import ConfigError, DataError, nearest

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 47),
    "orange": (245, 145, 40),
    "yellow": (250, 220, 60),
    "green": (70, 170, 80),
    "blue": (60, 120, 215),
    "purple": (140, 80, 180),
    "pink": (245, 150, 190),
    "brown": (140, 95, 60),
}
TRIES = 200
DRAWN, HOLE = 0.72, 0.8
"""Side of a drawing in a ring, and the inner diameter of the ring, as shares of the outer diameter."""


@dataclass(frozen=True)
class Thing:
    """One emoji of a scene: its row in the set, its box `(x0, y0, x1, y1)` in pixels, the colour of the ring around."""

    row: int
    box: tuple[int, int, int, int]
    colour: str | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """`image` uint8 [3, S, S]; `owner` int16 [S, S], which of the `things` a pixel shows, −1 for none of them.

    A ring, and the white inside it, belong to no thing: they are background.
    """

    image: Tensor
    owner: Tensor
    things: tuple[Thing, ...]


def compose(
    drawings: EmojiSet,
    rows: Sequence[int],
    generator: Generator,
    size: int = 128,
    scale: tuple[float, float] = (0.28, 0.5),
    colours: Sequence[str | None] | None = None,
    overlap: float = 0.0,
    by_size: bool = False,
) -> Scene:
    """Draw emoji at random places and sizes over a light background, the first one furthest back.

    Args:
        drawings: where the rows are from.
        rows: which emoji, in the order they are drawn.
        generator: decides sizes, places and background; the same state gives the same scene.
        size: height and width S of the scene in pixels.
        scale: least and largest side of an emoji's box as a share of S.
        colours: for each emoji the name of the colour of a ring around it, or None; rings fill the boxes. Inside a ring
            it is white: on a disc of that colour, drawings of the same colour would go under.
        overlap: largest share of the smaller of two boxes that the other may cover.
        by_size: the smallest furthest back, as if all were of one size and at different distances.

    Raises:
        ConfigError: an unknown colour, or as many colours as rows are not given.
        DataError: no place is found for all of them; fewer or smaller ones would have it.
    """
    colours = [None] * len(rows) if colours is None else list(colours)
    if len(colours) != len(rows):
        raise ConfigError(f"expected a colour or None for each of {len(rows)} emoji, got {len(colours)}")
    for name in colours:
        if name is not None and name not in COLOURS:
            raise ConfigError(f"no colour {name!r}; colours: {', '.join(COLOURS)}.{nearest(name, COLOURS)}")
    boxes = _places(len(rows), generator, size, scale, overlap, by_size)
    image = _background(generator, size)
    owner = torch.full((size, size), -1, dtype=torch.int16)
    for number, (row, box, colour) in enumerate(zip(rows, boxes, colours)):
        x, y, right, bottom = box
        region = (slice(y, bottom), slice(x, right))
        if colour is not None:
            whole, hole = _disc(bottom - y, 1.0), _disc(bottom - y, HOLE)
            ringed = _over(image[(slice(None), *region)], COLOURS[colour], whole)
            image[(slice(None), *region)] = _over(ringed, (255, 255, 255), hole)
            owner[region][whole > 127] = -1  # a ring hides what is behind it
        inner = bottom - y if colour is None else round(DRAWN * (bottom - y))
        inset = (bottom - y - inner) // 2
        part = (slice(y + inset, y + inset + inner), slice(x + inset, x + inset + inner))
        rgba = _resized(drawings.images[row], inner)
        image[(slice(None), *part)] = composite(rgba, image[(slice(None), *part)])
        owner[part][rgba[3] > 127] = number
    return Scene(image, owner, tuple(Thing(int(r), b, c) for r, b, c in zip(rows, boxes, colours)))


def _places(
    count: int, generator: Generator, size: int, scale: tuple[float, float], overlap: float, by_size: bool
) -> list[tuple[int, int, int, int]]:
    """Boxes drawn one after another; all anew where one finds no place."""
    for _ in range(TRIES):
        boxes: list[tuple[int, int, int, int]] = []
        sides = (torch.rand(count, generator=generator) * (scale[1] - scale[0]) + scale[0]).mul(size).round().int()
        for side in sorted(sides.tolist()) if by_size else sides.tolist():
            corners = (torch.rand(20, 2, generator=generator) * (size - side + 1)).int().tolist()
            free = ((x, y, x + side, y + side) for x, y in corners)
            box = next((b for b in free if all(_shared(b, other) <= overlap for other in boxes)), None)
            if box is None:
                break
            boxes.append(box)
        else:
            return boxes
    raise DataError(f"{count} emoji of {scale} times the side find no place; draw fewer, smaller or overlapping")


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Share of the smaller box that the other covers."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    least = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(across, 0) * max(down, 0) / least


def _background(generator: Generator, size: int) -> Tensor:
    """White, or a light colour that goes over into another from one corner to the opposite one."""
    ends = 255 - torch.randint(0, 60, (2, 3, 1, 1), generator=generator).float()
    if float(torch.rand((), generator=generator)) < 0.3:
        ends = torch.full_like(ends, 255)
    ramp = torch.linspace(0, 1, size)
    slope = (ramp[None] + ramp[:, None]) / 2
    return (ends[0] + (ends[1] - ends[0]) * slope).round().to(torch.uint8)


def _disc(side: int, share: float) -> Tensor:
    """Coverage of a round disc with a share of a square's side as its diameter, uint8 [side, side]."""
    away = torch.arange(side) - (side - 1) / 2
    radius = (away[None] ** 2 + away[:, None] ** 2).sqrt()
    return ((share * side / 2 + 0.5 - radius).clamp(0, 1) * 255).round().to(torch.uint8)


def _over(image: Tensor, colour: tuple[int, int, int], cover: Tensor) -> Tensor:
    flat = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, *cover.shape)
    return composite(torch.cat([flat, cover[None]]), image)


def _resized(rgba: Tensor, side: int) -> Tensor:
    """One drawing at another size, in premultiplied colour, uint8 [4, side, side]."""
    alpha = rgba[3:].float() / 255
    both = torch.cat([rgba[:3].float() * alpha, rgba[3:].float()])[None]
    both = interpolate(both, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    colour = both[:3] / (both[3:] / 255).clamp_min(1e-6)
    return torch.cat([colour, both[3:]]).round().clamp_(0, 255).to(torch.uint8)
