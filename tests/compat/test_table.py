"""The page lists the tests that there are."""

from __future__ import annotations

import re

from tests.compat.rows import all_rows
from tests.compat.table import HEAD, PAGE, lines

REMEDY = "run: python -m tests.compat.table"


def test_the_page_has_every_row_and_no_other() -> None:
    text = PAGE.read_text("utf-8")
    assert text.startswith(HEAD), REMEDY
    assert [line for line in text.split("\n") if line.endswith("` |")] == lines(all_rows()), REMEDY
    libraries = list(dict.fromkeys(row.library for row in all_rows()))
    assert re.findall(r"^## (\S+) (?:\d|not installed).*$", text, re.MULTILINE) == libraries, REMEDY
