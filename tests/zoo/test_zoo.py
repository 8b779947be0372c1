"""A few models of the zoo, others every day: every product is accounted for, and LoRA lives at all of them."""

from __future__ import annotations

import importlib

import pytest

from tests.support.shares import ALL, settle
from tests.zoo.judge import LIBRARIES, judge
from tests.zoo.run import is_whole

DAILY = {"timm": 2, "open_clip": 1, "diffusers": 2, "torchvision": 1}
"""How many models of a library run on one day."""
SLOW = (
    "_50",
    "rcnn",
    "retinanet",
    "fcos",
    "raft",
    "mvit",
    "ViT-H",
    "ViT-g",
    "ViT-bigG",
    "SO400M",
    "xxlarge",
    "Kandinsky3",
)


def sample() -> list[tuple[str, str]]:
    """Models of the session's share; with `--share-seed all`, those of the first day."""
    seed = settle(None)
    day = 0 if seed == ALL else int(seed)
    chosen = []
    for library, count in DAILY.items():
        names = importlib.import_module(LIBRARIES[library]).names()
        names = [name for name in names if not any(word in name for word in SLOW)]
        chosen += [(library, names[(day * count + i) * 7 % len(names)]) for i in range(count)]
    return chosen


@pytest.mark.parametrize(("library", "name"), sample(), ids=lambda value: value)
def test_every_product_is_accounted_for_and_lora_lives(library: str, name: str) -> None:
    row = judge(library, name, only=("LoRA",))
    assert is_whole(row), {key: row.get(key) for key in ("error", "missed", "methods")}
