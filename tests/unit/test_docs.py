"""Links in the documents lead somewhere, the configurations they name exist, and code that needs nothing else runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mmpeft
from mmpeft.sites import notes

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


def test_any_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The page is one program from top to bottom; what it prints is what its comments say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmpeft.sites.notes._NOTES", dict(notes._NOTES))
    text = (ROOT / "docs" / "any_model.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    space = {"__name__": "docs_any_model"}
    exec("\n".join(blocks), space)
    promised = [line.rpartition("  # ")[2] for block in blocks for line in block.splitlines() if "print(" in line]
    printed = capsys.readouterr().out.splitlines()
    assert len(promised) == 2
    assert all(line in printed for line in promised)
    space["tuning"].detach()
    assert mmpeft.load(space["model"], "out/").report().trainable > 0
