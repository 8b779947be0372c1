"""Regular expressions that a file brings: as PEFT applies them, bounded in time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import regex

from mmpeft.errors import AdapterFileError
from mmpeft.types import Leaf

SECONDS = 0.25
"""That one comparison may take; honest patterns take a few microseconds."""
LONGEST = 2_000_000  # all modules of a model, by name


@lru_cache(256)
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > LONGEST:
        raise AdapterFileError(f"a pattern of {len(pattern):,} characters; expected at most {LONGEST:,}")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise AdapterFileError(f"{pattern!r} is no regular expression: {error}") from error


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches all of a module's path.

    Raises:
        AdapterFileError: no regular expression, or one that takes too long.
    """
    try:
        return _compiled(pattern).fullmatch(path, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise AdapterFileError(
            f"the pattern {pattern!r} takes more than {SECONDS} s on {path!r}; write the modules out by name"
        ) from error


def value_for(patterns: Mapping[str, Leaf] | None, path: str, default: Leaf) -> Leaf:
    """PEFT's own rule for ranks and scales: that of the first pattern that matches a path, or its end after a dot.

    Where none matches, a path that stands there as it is counts, whatever it would mean as a pattern.
    """
    known = patterns or {}
    return next((v for key, v in known.items() if matches(rf"(.*\.)?({key})", path)), known.get(path, default))
