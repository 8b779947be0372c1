"""Questions about scenes: their answers, found again in another way, and what the text alone gives away."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest
import torch

from mmpeft.embedded import EmojiSet, emoji
from mmpeft.embedded.scenes import Scene
from mmpeft.errors import DataError
from mmpeft.vla.vqa.questions import ANSWERS, KINDS, MARGIN, TYPE_ANSWERS, TYPES, Grammar, Question, quadrant

SIZE, SCENES = 96, 1500
CHANCE = {name: 1 / len(answers) for name, answers in TYPE_ANSWERS.items()}


def ask(split: str, count: int, seed: int = 0) -> list[tuple[Scene, list[Question]]]:
    grammar, generator = Grammar(emoji("openmoji", split), SIZE), torch.Generator().manual_seed(seed)
    return [grammar.ask(generator) for _ in range(count)]


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[Question]]]:
    return ask("test", SCENES)


def things(scene: Scene, drawings: EmojiSet) -> list[dict[str, object]]:
    """Facts of each thing by its pixels: kind by subcategory, middle of its box, colour."""
    found = []
    for thing in scene.things:
        label = drawings.subcategories[int(drawings.sublabels[thing.row])]
        (kind,) = (kind for kind, own in KINDS.items() if label in own)
        x = (thing.box[0] + thing.box[2]) / 2 / SIZE
        y = (thing.box[1] + thing.box[3]) / 2 / SIZE
        found.append({"kind": kind, "x": x, "y": y, "colour": thing.colour})
    return found


def side(a: dict, b: dict, direction: str) -> float:
    """How far a is in a direction from b; negative on the other side."""
    return {
        "left of": b["x"] - a["x"],
        "right of": a["x"] - b["x"],
        "above": b["y"] - a["y"],
        "below": a["y"] - b["y"],
    }[direction]


def answer(text: str, seen: list[dict]) -> str:
    """The one answer to a question, by its words; fails where there is none or more than one."""
    directions = "left of|right of|above|below"

    def only(kind: str) -> dict:
        (found,) = (t for t in seen if t["kind"] == kind)
        return found

    if match := re.fullmatch(r"how many (.+)s are there\?", text):
        return str(sum(t["kind"] == match[1] for t in seen))
    if match := re.fullmatch(r"what colour is the ring around the (.+)\?", text):
        return only(match[1])["colour"]
    if match := re.fullmatch(r"what is in the (\w+) ring\?", text):
        (found,) = (t["kind"] for t in seen if t["colour"] == match[1])
        return found
    if match := re.fullmatch(rf"what is ({directions}) the (.+)\?", text):
        it = only(match[2])
        distances = [(side(t, it, match[1]), t["kind"]) for t in seen if t is not it]
        assert all(abs(far) > MARGIN for far, _ in distances), "nothing may be neither here nor there"
        (found,) = (kind for far, kind in distances if far > 0)
        return found
    if match := re.fullmatch(r"where is the (.+)\?", text):
        it = only(match[1])
        return f"{'top' if it['y'] < 0.5 else 'bottom'} {'left' if it['x'] < 0.5 else 'right'}"
    match = re.fullmatch(rf"is the (.+) ({directions}) the (.+)\?", text)
    assert match, text
    far = side(only(match[1]), only(match[3]), match[2])
    assert abs(far) > MARGIN
    return "yes" if far > 0 else "no"


def test_every_answer_is_true_and_the_only_one(asked: list[tuple[Scene, list[Question]]]) -> None:
    drawings = emoji("openmoji", "test")
    for scene, questions in asked:
        seen = things(scene, drawings)
        # the same make-up in every scene: it tells nothing of the number that is asked for
        assert sorted(Counter(t["kind"] for t in seen).values()) == [1, 1, 2]
        assert len({t["colour"] for t in seen}) == len(seen)
        for question in questions:
            assert answer(question.text, seen) == question.answer
            assert question.answer in TYPE_ANSWERS[question.type]
            assert question.answer in ANSWERS
        assert len({q.text for q in questions}) == len(questions)


def test_who_does_not_know_where_to_look_has_to_guess(asked: list[tuple[Scene, list[Question]]]) -> None:
    """Of the kinds of a scene none is likelier in a ring, of the numbers none asked for more often."""
    for _, questions in asked:
        rings = [q.answer for q in questions if q.text.endswith(" ring?")]
        assert len(rings) == len(set(rings)) == 3
        assert sorted(q.answer for q in questions if q.type == "count") == ["0", "1", "2"]
        assert len({q.answer for q in questions if q.type == "colour"}) == 2


def test_the_text_alone_is_worth_no_more_than_chance(asked: list[tuple[Scene, list[Question]]]) -> None:
    """The most frequent answer to each text in one half of the scenes, given in the other half."""
    seen: dict[str, Counter] = defaultdict(Counter)
    for _, questions in asked[: SCENES // 2]:
        for question in questions:
            seen[question.text][question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for _, questions in asked[SCENES // 2 :]:
        for question in questions:
            if question.text in seen:
                right[question.type].append(seen[question.text].most_common(1)[0][0] == question.answer)
    for name in TYPES:
        count = len(right[name])
        deviation = (CHANCE[name] * (1 - CHANCE[name]) / count) ** 0.5
        # what is beside a mammal is no mammal: one kind less to guess among
        assert sum(right[name]) / count < CHANCE[name] + 3 * deviation + 0.01, name


def test_answers_of_each_type_are_equally_frequent(asked: list[tuple[Scene, list[Question]]]) -> None:
    for name, answers in TYPE_ANSWERS.items():
        counts = Counter(q.answer for _, questions in asked for q in questions if q.type == name)
        assert set(counts) == set(answers)
        mean = sum(counts.values()) / len(answers)
        assert all(abs(c - mean) < 4 * mean**0.5 for c in counts.values()), (name, counts)


def test_the_same_generator_gives_the_same_questions() -> None:
    first, second = ask("val", 5), ask("val", 5)
    for (one, questions), (other, again) in zip(first, second):
        assert torch.equal(one.image, other.image)
        assert questions == again
    assert ask("val", 1, seed=1)[0][1] != first[0][1]


def test_near_the_middle_is_no_quadrant() -> None:
    unasked = 0
    for scene, questions in ask("train", 50):
        quadrants = [quadrant(thing, SIZE) for thing in scene.things[2:]]
        assert sorted(q.answer for q in questions if q.type == "where") == sorted(q for q in quadrants if q)
        unasked += quadrants.count(None)
    assert unasked


def test_a_kind_without_drawings_is_named() -> None:
    import dataclasses

    drawings = emoji("openmoji", "val")
    no_hearts = [i for i, n in enumerate(drawings.sublabels.tolist()) if drawings.subcategories[n] != "heart"]
    few = dataclasses.replace(drawings, images=drawings.images[no_hearts], sublabels=drawings.sublabels[no_hearts])
    with pytest.raises(DataError, match="'heart'"):
        Grammar(few)
