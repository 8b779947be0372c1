"""The generated page says what the code does, a column at a time."""

from __future__ import annotations

import re

import pytest

from mmpeft.sites import sites
from tests.matrix.cells import rows
from tests.matrix.expected import refusal, unmergeable
from tests.matrix.families import FAMILIES, LIBRARIES
from tests.matrix.table import HEAD, PAGE, cell, shortened, written

REMEDY = "run: python -m tests.matrix.table"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_says_what_methods_need_and_refuse(family: str) -> None:
    """Exactly, so that a cell can change from working to refused only where the page is seen to change too."""
    model = FAMILIES[family]().model
    available = sites(model)
    assert list(written()[family]) == list(rows()), REMEDY
    for label, method in rows().items():
        error = refusal(method, model, available)
        mark = "●" if method.mergeable and not unmergeable(label, family) else "○"
        expected = (mark, "") if error is None else ("", shortened(error))
        assert written()[family][label] == expected, f"{label}: {REMEDY}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_is_up_to_date(family: str) -> None:
    column = written()[family]
    for label, said in column.items():
        assert cell(label, family) == said, f"{label}: {REMEDY}"


def test_the_page_has_its_head_and_every_library() -> None:
    text = PAGE.read_text("utf-8")
    assert text.startswith(HEAD), REMEDY
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [*LIBRARIES, "Refusals"], REMEDY
    assert list(written()) == list(FAMILIES), REMEDY
