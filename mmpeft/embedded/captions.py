"""What may be said of an emoji: for pretraining on images with texts."""

from __future__ import annotations

import torch

from mmpeft.embedded.emoji import EmojiSet, spoken

TEMPLATES = ("{}", "a drawing of {}", "a picture of {}", "an icon of a {}", "a photo of a {}.")


def captions(sets: EmojiSet) -> list[list[str]]:
    """What may be said of each emoji: its name and keywords, alone and with what kind of thing it is."""
    found = []
    for name, keywords, sub, label in zip(sets.names, sets.keywords, sets.sublabels.tolist(), sets.labels.tolist()):
        kind, group = spoken(sets.subcategories[sub]), spoken(sets.classes[label])
        names = list(dict.fromkeys([spoken(name), *map(spoken, keywords)]))
        said = [*names, *(f"{n}, {kind}" for n in names), f"{names[0]}, {kind}, {group}", f"{group}: {names[0]}"]
        found.append(said)
    return found


def dressed(text: str) -> str:
    """A text alone, half of the time, or in one of the templates that people put around class names."""
    alone = bool(torch.rand(()) < 0.5)
    return text if alone else TEMPLATES[int(torch.randint(len(TEMPLATES), ()))].format(text)
