"""Composed scenes: the same seed the same scene, masks that are exact, boxes that keep apart."""

from __future__ import annotations

import pytest
import torch

from mmpeft.embedded import emoji
from mmpeft.embedded.emoji import composite
from mmpeft.embedded.scenes import COLOURS, Scene, _resized, _shared, compose
from mmpeft.errors import ConfigError, DataError


def scene(seed: int = 0, rows: tuple[int, ...] = (3, 50, 120), **options: object) -> Scene:
    return compose(emoji("openmoji", "val"), rows, torch.Generator().manual_seed(seed), **options)  # type: ignore[arg-type]


def test_one_seed_one_scene() -> None:
    first, again, other = scene(), scene(), scene(1)
    assert torch.equal(first.image, again.image)
    assert first.things == again.things
    assert torch.equal(first.owner, again.owner)
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("seed", range(10))
def test_boxes_keep_apart_inside_the_scene(seed: int) -> None:
    boxes = [thing.box for thing in scene(seed).things]
    assert all(0 <= x < right <= 128 and 0 <= y < bottom <= 128 for x, y, right, bottom in boxes)
    assert all(_shared(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    near = [thing.box for thing in scene(seed, overlap=0.3).things]
    assert all(_shared(a, b) <= 0.3 for i, a in enumerate(near) for b in near[:i])


@pytest.mark.parametrize("colours", [None, ("red", None, "blue")])
def test_masks_are_the_drawings_own(colours: tuple[str | None, ...] | None) -> None:
    made, drawings = scene(colours=colours), emoji("openmoji", "val")
    for number, thing in enumerate(made.things):
        x, y, _right, bottom = thing.box
        inner = bottom - y if thing.colour is None else round(0.72 * (bottom - y))
        inset = (bottom - y - inner) // 2
        rgba = _resized(drawings.images[thing.row], inner)
        region = (slice(y + inset, y + inset + inner), slice(x + inset, x + inset + inner))
        assert torch.equal(made.owner[region] == number, rgba[3] > 127)
        solid = rgba[3] == 255
        assert torch.equal(made.image[(slice(None), *region)][:, solid], rgba[:3, solid])
    outside = made.owner == -1
    assert outside.any()


def test_later_things_hide_earlier_ones() -> None:
    made = scene(4, (3, 50, 120, 7), scale=(0.5, 0.6), overlap=0.6)
    assert {int(i) for i in made.owner.unique()} == {-1, 0, 1, 2, 3}
    x, y, right, bottom = made.things[-1].box
    top = _resized(emoji("openmoji", "val").images[made.things[-1].row], bottom - y)
    assert torch.equal(made.owner[y:bottom, x:right] == 3, top[3] > 127)


def test_rings_have_their_colour() -> None:
    made = scene(colours=("red", "green", "blue"))
    for thing in made.things:
        x, y, right, _bottom = thing.box
        middle = (x + right) // 2
        assert tuple(made.image[:, y + 2, middle].tolist()) == COLOURS[str(thing.colour)]
        assert int(made.owner[y + 1, middle]) == -1


def test_what_cannot_be_composed() -> None:
    with pytest.raises(DataError, match="find no place"):
        scene(rows=(1, 2, 3, 4, 5), scale=(0.6, 0.7))
    with pytest.raises(ConfigError, match="no colour 'redd'"):
        scene(colours=("redd", None, None))
    with pytest.raises(ConfigError, match="each of 3"):
        scene(colours=("red",))


def test_composite_broadcasts_over_an_image() -> None:
    rgba = torch.zeros(4, 2, 2, dtype=torch.uint8)
    image = torch.full((3, 2, 2), 9, dtype=torch.uint8)
    assert torch.equal(composite(rgba, image), image)
