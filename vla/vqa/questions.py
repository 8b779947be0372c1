"""Questions about composed scenes, in a small grammar: each with one true answer, all answers equally often.

Kinds, colours and places of a scene are drawn independently of each other, and from an answer's truth or falsehood
no scene is kept or thrown away. So every answer to a given text is as likely as any other, and who reads the question
alone is left to guess; several questions about one scene keep that. Nothing ambiguous is asked: a kind that is asked
about by name stands in the scene once, and directions hold, or fail, by a clear margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from mmpeft.embedded import EmojiSet
from mmpeft.embedded.scenes import COLOURS, Scene, Thing, compose
from mmpeft.errors import DataError

KINDS: dict[str, tuple[str, ...]] = {
    "flag": ("country-flag",),
    "mammal": ("animal-mammal",),
    "face": ("face-smiling", "face-affection", "face-concerned", "face-neutral-skeptical", "face-unwell"),
    "worker": ("person-role",),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
    "meal": ("food-prepared", "food-asian"),
    "garment": ("clothing",),
    "clock": ("time",),
    "heart": ("heart",),
    "building": ("place-building", "place-religious"),
    "weather sign": ("sky & weather",),
    "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-fingers-closed", "hand-single-finger", "hands"),
}
"""How a question calls the emoji of some subcategories; the plural takes an s."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis (0 across, 1 down) and sign of the first thing's centre from the second's."""

OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("0", "1", "2")
TYPE_ANSWERS: dict[str, tuple[str, ...]] = {
    "what": tuple(KINDS),
    "where": QUADRANTS,
    "count": NUMBERS,
    "colour": tuple(COLOURS),
    "relation": ("yes", "no"),
}
TYPES = tuple(TYPE_ANSWERS)
ANSWERS = tuple(answer for answers in TYPE_ANSWERS.values() for answer in answers)
MARGIN = 0.12
"""Of the scene's side: centres nearer than that are neither left nor right of each other."""
SIDES = (0.3, 0.4)
"""Least and largest box of a thing, as shares of the scene's side."""


@dataclass(frozen=True)
class Question:
    """What is asked about a scene, the answer, and which of the `TYPES` it is."""

    text: str
    answer: str
    type: str


class Grammar:
    """Composes scenes of emoji of one set and asks about them."""

    def __init__(self, drawings: EmojiSet, size: int = 128) -> None:
        """
        Args:
            drawings: where the emoji are from.
            size: height and width of the scenes in pixels.

        Raises:
            DataError: a kind has no drawing.
        """
        self.drawings, self.size = drawings, size
        labels = [drawings.subcategories[label] for label in drawings.sublabels.tolist()]
        self.rows = {kind: [r for r, label in enumerate(labels) if label in own] for kind, own in KINDS.items()}
        empty = [kind for kind, own in self.rows.items() if not own]
        if empty:
            raise DataError(f"no drawing is of the kind {empty[0]!r}; questions need one of each")
        self.kind_of = {row: kind for kind, own in self.rows.items() for row in own}

    def ask(self, generator: Generator) -> tuple[Scene, list[Question]]:
        """A scene of four things, two of them of one kind, and what the grammar can ask about it, in random order.

        Every scene has the same make-up, so that its number of things tells nothing of the number asked for. It is
        asked about one kind each that it has twice, once and never, and about what is in a ring of each kind: who
        knows the scene, but not where to look, has to guess.
        """
        double, first, second, absent = _draw(generator, list(KINDS), 4)
        kinds = [double, double, first, second]
        rows = [self.rows[kind][_one(generator, len(self.rows[kind]))] for kind in kinds]
        colours = _draw(generator, list(COLOURS), len(kinds))
        scene = compose(self.drawings, rows, generator, self.size, SIDES, colours)
        questions = [
            Question(f"how many {kind}s are there?", number, "count")
            for number, kind in zip(NUMBERS, (absent, first, double))
        ]
        things = list(zip(kinds, scene.things))
        for kind, thing in (things[_one(generator, 2)], *things[2:]):  # of the two alike only one: no kind is likelier
            questions.append(Question(f"what is in the {thing.colour} ring?", kind, "what"))
        for kind, thing in things[2:]:
            questions.append(Question(f"what colour is the ring around the {kind}?", str(thing.colour), "colour"))
            where = quadrant(thing, self.size)
            if where is not None:
                questions.append(Question(f"where is the {kind}?", where, "where"))
            for direction in DIRECTIONS:
                found = self._beside(scene, direction, thing)
                if found is not None:
                    questions.append(Question(f"what is {direction} the {kind}?", found, "what"))
        for axis in (0, 1):
            (kind, thing), (other, beside) = things[2:] if _one(generator, 2) else things[:1:-1]
            direction, opposite = [name for name, (own, _) in DIRECTIONS.items() if own == axis]
            if _one(generator, 2):
                direction, opposite = opposite, direction
            truth = stands(thing, direction, beside, self.size)
            if truth or stands(thing, opposite, beside, self.size):
                text = f"is the {kind} {direction} the {other}?"
                questions.append(Question(text, "yes" if truth else "no", "relation"))
        return scene, [questions[i] for i in torch.randperm(len(questions), generator=generator).tolist()]

    def _beside(self, scene: Scene, direction: str, thing: Thing) -> str | None:
        """The kind of the one other thing in a direction; None where there is none, several, or something between."""
        rest = [other for other in scene.things if other is not thing]
        there = [other for other in rest if stands(other, direction, thing, self.size)]
        clear = all(stands(other, OPPOSITES[direction], thing, self.size) for other in rest if other not in there)
        return self.kind_of[there[0].row] if len(there) == 1 and clear else None


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


def _one(generator: Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=generator))


def _draw(generator: Generator, names: Sequence[str], count: int) -> list[str]:
    """Different names in random order."""
    return [names[i] for i in torch.randperm(len(names), generator=generator)[:count].tolist()]
