"""The installed domains, by entry point."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points

GROUP = "mmpeft.domains"


def domain_entries() -> tuple[EntryPoint, ...]:
    """Entry points of the installed domains; none is imported."""
    return _found(tuple(sys.path))


@cache
def _found(search: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Looked for once for each search path: a look reads what is said of every installed package."""
    return tuple(entry_points(group=GROUP))
