"""Questions about composed scenes, in a small grammar: each with one true answer, all answers equally often.

For every question the answer is drawn first and a scene is made for it, so that who reads the question alone is left
to guess. Nothing ambiguous is asked: a kind that is asked about by name stands in the scene once, and directions hold
by a clear margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from mmpeft.embedded import EmojiSet
from mmpeft.embedded.scenes import COLOURS, Scene, Thing, compose
from mmpeft.errors import DataError

KINDS: dict[str, str] = {
    "flag": "country-flag",
    "mammal": "animal-mammal",
    "vehicle": "transport-ground",
    "meal": "food-prepared",
    "fruit": "food-fruit",
    "heart": "heart",
    "clock": "time",
    "building": "place-building",
    "garment": "clothing",
    "weather": "sky & weather",
}
"""How a question calls a subcategory of emoji."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis (0 across, 1 down) and sign of the first thing's centre from the second's."""

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("0", "1", "2", "3")
TYPES = ("what", "where", "count", "colour", "relation")
ANSWERS = (*KINDS, *QUADRANTS, *NUMBERS, *COLOURS, "yes", "no")
TYPE_ANSWERS = {
    "what": tuple(KINDS),
    "where": QUADRANTS,
    "count": NUMBERS,
    "colour": tuple(COLOURS),
    "relation": ("yes", "no"),
}
MARGIN = 0.12
"""Of the scene's side: centres nearer than that are neither left nor right of each other."""
TRIES = 100


@dataclass(frozen=True)
class Question:
    """A scene, what is asked about it, the answer, and which of the five types it is."""

    scene: Scene
    text: str
    answer: str
    type: str


class Grammar:
    """Asks questions about scenes of emoji of one set."""

    def __init__(self, drawings: EmojiSet, rows: Sequence[Sequence[int]], size: int = 128) -> None:
        """Args:
        drawings: where the emoji are from.
        rows: which of them are of each kind, in the order of `KINDS`.
        size: height and width of the scenes in pixels.
        """
        self.drawings, self.size = drawings, size
        self.rows = dict(zip(KINDS, rows))
        empty = [kind for kind, own in self.rows.items() if not len(own)]
        if empty:
            raise DataError(f"no drawing is of the kind {empty[0]!r}; questions need one of each")

    def ask(self, kind: str, generator: Generator) -> Question:
        """A question of one of the `TYPES`.

        Raises:
            DataError: no scene is found for it.
        """
        for _ in range(TRIES):
            found: Question | None = getattr(self, f"_{kind}")(generator)
            if found is not None:
                return found
        raise DataError(f"no scene of {self.size} pixels is found for a question of type {kind!r}")

    def _what(self, g: Generator) -> Question | None:
        answer, other, third = _draw(g, list(KINDS), 3)
        if _one(g, 2):
            scene = self._scene(g, [answer, other, third])
            return Question(scene, f"what is on the {scene.things[0].colour} disc?", answer, "what")
        scene = self._scene(g, [answer, other])
        holds = [d for d in DIRECTIONS if stands(scene.things[0], d, scene.things[1], self.size)]
        if not holds:
            return None
        return Question(scene, f"what is {holds[_one(g, len(holds))]} the {other}?", answer, "what")

    def _where(self, g: Generator) -> Question | None:
        answer, kinds = QUADRANTS[_one(g, 4)], _draw(g, list(KINDS), 3)
        scene = self._scene(g, kinds)
        if quadrant(scene.things[0], self.size) != answer:
            return None
        return Question(scene, f"where is the {kinds[0]}?", answer, "where")

    def _count(self, g: Generator) -> Question:
        count, kinds = _one(g, 4), _draw(g, list(KINDS), 4)
        scene = self._scene(g, [kinds[0]] * count + kinds[1 : 4 - count])
        return Question(scene, f"how many things are of the kind {kinds[0]}?", NUMBERS[count], "count")

    def _colour(self, g: Generator) -> Question:
        kinds = _draw(g, list(KINDS), 3)
        scene = self._scene(g, kinds)
        return Question(scene, f"what colour is behind the {kinds[0]}?", str(scene.things[0].colour), "colour")

    def _relation(self, g: Generator) -> Question | None:
        kinds, direction = _draw(g, list(KINDS), 3), list(DIRECTIONS)[_one(g, 4)]
        answer = "yes" if _one(g, 2) else "no"
        scene = self._scene(g, kinds)
        first, second = scene.things[:2]
        true, false = (stands(*pair, self.size) for pair in ((first, direction, second), (second, direction, first)))
        if (answer == "yes" and not true) or (answer == "no" and not false):
            return None
        return Question(scene, f"is the {kinds[0]} {direction} the {kinds[1]}?", answer, "relation")

    def _scene(self, g: Generator, kinds: Sequence[str]) -> Scene:
        rows = [self.rows[kind][_one(g, len(self.rows[kind]))] for kind in kinds]
        return compose(self.drawings, rows, g, self.size, (0.3, 0.45), _draw(g, list(COLOURS), len(kinds)))


def centre(thing: Thing, size: int) -> tuple[float, float]:
    """Middle of a thing's box, across and down, as shares of the scene's side."""
    x, y, right, bottom = thing.box
    return (x + right) / 2 / size, (y + bottom) / 2 / size


def stands(first: Thing, direction: str, second: Thing, size: int) -> bool:
    """Whether one thing is clearly in a direction from another."""
    axis, sign = DIRECTIONS[direction]
    return (centre(first, size)[axis] - centre(second, size)[axis]) * sign > MARGIN


def quadrant(thing: Thing, size: int) -> str | None:
    """The quarter of the scene a thing is clearly in; None near the middle lines."""
    across, down = centre(thing, size)
    if min(abs(across - 0.5), abs(down - 0.5)) < MARGIN / 2:
        return None
    return QUADRANTS[2 * (down > 0.5) + (across > 0.5)]


def _one(g: Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=g))


def _draw(g: Generator, names: Sequence[str], count: int) -> list[str]:
    """Different names in random order."""
    return [names[i] for i in torch.randperm(len(names), generator=g)[:count].tolist()]
