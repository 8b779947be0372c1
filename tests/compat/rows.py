"""The tier's registry: what is run with which library; `docs/compatibility.md` is written from it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

SAME = "as an untouched copy"


class Row(NamedTuple):
    """One line of the table: the distribution, what was run, what is right, and the test that holds it to that."""

    library: str
    what: str
    result: str
    test: str


ROWS: list[Row] = []


def row(library: str, what: str, result: str = SAME) -> Callable[[Any], Any]:
    """Enter a test in the table."""

    def enter(test: Any) -> Any:
        where = f"{test.__module__.rpartition('.')[2]}.py::{test.__name__}"
        ROWS.append(Row(library, what, result, where))
        return test

    return enter


def all_rows() -> list[Row]:
    """The rows of every test file of this folder."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        import_module(f"{__package__}.{path.stem}")
    return sorted(set(ROWS), key=lambda r: (r.library.lower(), r.test))
