"""The suite in turns: which share of what is too much for every day runs today.

A seed chooses the turn, the number of days since 1970 unless `--share-seed` or `MMPEFT_SEED` says another;
`--share-seed all` (`make test-all`) runs everything. `ROUND` seeds one after the other run everything too.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

ROUND = 18
VARIABLE = "MMPEFT_SEED"
ALL = "all"


def settle(option: str | None) -> str:
    """The seed of a session, kept in the environment: xdist's workers inherit it, so that all run one share."""
    seed = option or os.environ.get(VARIABLE) or str(int(time.time() // 86400))
    if seed != ALL and not seed.isdecimal():
        raise ValueError(f"the seed of a share must be a number or {ALL!r}, got {seed!r}")
    os.environ[VARIABLE] = seed
    return seed


def turns(cells: Sequence[T], keys: Callable[[T], Iterable[Hashable]]) -> dict[T, frozenset[int]]:
    """The turns of every cell, of `ROUND`: each at least one, and each key of `keys(cell)` some cell in every turn.

    The first key deals its cells out one after the other, each first key starting where the former left off by one;
    what keys still lack then, they take from their cells with the fewest turns.
    """
    found: dict[T, set[int]] = {}
    firsts: dict[Hashable, int] = {}
    dealt: Counter[Hashable] = Counter()
    for cell in cells:
        first, *_ = keys(cell)
        start = firsts.setdefault(first, len(firsts))
        found[cell] = {(start + dealt[first]) % ROUND}
        dealt[first] += 1
    members: dict[Hashable, list[T]] = {}
    for cell in cells:
        for key in keys(cell):
            members.setdefault(key, []).append(cell)
    for own in members.values():
        for turn in range(ROUND):
            if not any(turn in found[cell] for cell in own):
                found[min(own, key=lambda cell: len(found[cell]))].add(turn)
    return {cell: frozenset(turn) for cell, turn in found.items()}


def of_today(
    cells: Sequence[T], keys: Callable[[T], Iterable[Hashable]], shift: int = 0, seed: str | None = None
) -> list[T]:
    """The cells of a seed's turn, by default of this session's; `shift` sets apart what is dealt out several times."""
    seed = settle(None) if seed is None else seed
    if seed == ALL:
        return list(cells)
    turn = (int(seed) + shift) % ROUND
    return [cell for cell, own in turns(cells, keys).items() if turn in own]
