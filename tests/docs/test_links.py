"""Links in the documents lead somewhere, and the configurations they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmpeft.run.shipped import shipped
from tests.docs.blocks import ROOT, pages

MADE = ("methods/", "backbones/", "api/", "notebooks/")
"""Folders of pages that exist on the site alone; mkdocs checks the links to them."""


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths(page: Path) -> None:
    text = page.read_text("utf-8")
    links = [m for m in re.findall(r"\]\(([^)#\s]+)[)#]", text) if "://" not in m]
    links = [link for link in links if not link.removeprefix("../").startswith(MADE)]
    named = re.findall(r"configs/[\w/]+\.yaml", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in re.findall(r"-c (\w+/\w+)", text) if name not in shipped()]
    assert not missing
