"""Links in the documents lead somewhere, the configurations they name exist, and code that needs nothing else runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mmpeft
from mmpeft.methods import METHODS
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


def test_a_method_of_ones_own_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The section on methods is one program; what it prints is what its comment says."""
    text = (ROOT / "docs" / "extend.md").read_text("utf-8").partition("## A task")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    module = ModuleType("docs_extend")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, "Shifts", None)  # and none of that name afterwards
    space = vars(module)
    exec("\n".join(blocks), space)
    (promised,) = re.findall(r"^print\(.*  # (.*)$", "\n".join(blocks), re.MULTILINE)
    assert capsys.readouterr().out.strip() == promised
    space["test_my_method"]()
