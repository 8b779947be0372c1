"""A random mask: what every scored mask must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.controllers.scores import Score
from mmpeft.methods.base import register
from mmpeft.methods.shared.selection import EntryMask


@register("https://arxiv.org/abs/2111.09839", "selective", mergeable=True)
@dataclass(frozen=True)
class RandomMask(EntryMask):
    """A random `density` of the blocks' entries, drawn by torch's generator when attached."""

    score: ClassVar[Score] = "random"
