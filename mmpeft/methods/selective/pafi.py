"""PaFi: the entries of smallest magnitude, the same for every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.controllers.scores import Score
from mmpeft.methods.base import register
from mmpeft.methods.shared.selection import EntryMask


@register("https://arxiv.org/abs/2305.16742", "selective", mergeable=True)
@dataclass(frozen=True)
class PaFi(EntryMask):
    """The `density` of entries with the smallest `|θ0|` in all matrices of the blocks; needs no data."""

    score: ClassVar[Score] = "small"
    matrices: ClassVar[bool] = True
