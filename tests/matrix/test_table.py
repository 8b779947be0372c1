"""The generated page says what the code does, a column at a time."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.matrix.cells import rows
from tests.matrix.expected import REFUSED, UNMERGEABLE, reason
from tests.matrix.families import FAMILIES, LIBRARIES
from tests.matrix.table import HEAD, PAGE, cell

REMEDY = "run: python -m tests.matrix.table"


@cache
def written() -> dict[str, dict[str, tuple[str, str]]]:
    """Family -> method -> `(mark, reason)` as the page has them."""
    text = PAGE.read_text("utf-8")
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *lines = [
            [part.strip() for part in line.split(" | ")] for line in table.replace("|\n", "\n").split("\n")
        ]
        for number, family in enumerate(head[1:], 1):
            column = {line[0].removeprefix("| "): line[number] for line in lines if len(line) > 1}
            found[family] = {label: ("", reasons[m]) if m.isdecimal() else (m, "") for label, m in column.items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_is_what_the_invariants_hold_it_to(family: str) -> None:
    """By the expectations that every cell is tested against in `test_invariants.py`."""
    for label, method in rows().items():
        mark, why = written()[family][label]
        refused = reason(REFUSED, label, family)
        merges = method.mergeable and not reason(UNMERGEABLE, label, family)
        assert mark == ("" if refused else "●" if merges else "○"), f"{label}: {REMEDY}"
        assert not refused or re.search(refused, why), f"{label}: {REMEDY}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_is_up_to_date(family: str) -> None:
    column = written()[family]
    assert list(column) == list(rows()), REMEDY
    for label, said in column.items():
        assert cell(label, family) == said, f"{label}: {REMEDY}"


def test_the_page_has_its_head_and_every_library() -> None:
    text = PAGE.read_text("utf-8")
    assert text.startswith(HEAD), REMEDY
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [*LIBRARIES, "Refusals"], REMEDY
    assert list(written()) == list(FAMILIES), REMEDY
