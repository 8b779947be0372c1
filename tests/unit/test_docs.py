"""Links in the documents lead somewhere, and the configurations they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths(page: Path) -> None:
    text = page.read_text("utf-8")
    links = [m for m in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in m]
    named = re.findall(r"configs/[\w/]+\.yaml", text)
    missing = [link for link in links if not (page.parent / link).exists()] + [
        n for n in named if not (ROOT / n).exists()
    ]
    assert not missing
