"""The evaluator of emoji trained on 300 identities: enough for a test, and once a process."""

from __future__ import annotations

import copy
from functools import cache

from mmpeft.diffusion.data.emoji import spread
from mmpeft.diffusion.style.emoji_judge import EmojiJudge
from mmpeft.embedded import emoji
from mmpeft.embedded.emoji import STYLES

SIZE = 32


@cache
def _trained() -> EmojiJudge:
    known = emoji("openmoji", "train")
    kept = spread(known.labels, 300, 0)
    return EmojiJudge(SIZE, "openmoji", sorted(set(known.identity.tolist()) - set(known.identity[kept].tolist())))


def small_judge(style: str) -> EmojiJudge:
    """A judge of one's own that asks for a style; what it learned is the same for all of them."""
    judge = copy.copy(_trained())
    judge.style = STYLES.index(style)
    return judge
