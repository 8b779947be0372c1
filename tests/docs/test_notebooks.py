"""The notebooks run from top to bottom, with one training step in place of many; what they store is of their code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.docs.notebooks import FOLDER, ORDER

pytest.importorskip("matplotlib")


def cells(name: str) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_known() -> None:
    assert sorted(ORDER) == sorted(file.stem for file in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", ORDER)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMPEFT_STEPS", "1")
    space: dict[str, Any] = {"__name__": f"notebook_{name}"}
    with warnings.catch_warnings():
        for number, cell in enumerate(cells(name)):
            exec(compile("".join(cell["source"]), f"{name}.ipynb, code cell {number + 1}", "exec"), space)
    plt.close("all")


@pytest.mark.parametrize("name", ORDER)
def test_outputs_are_stored_and_none_is_an_error(name: str) -> None:
    stored = [output for cell in cells(name) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in stored), "run `make notebooks`"
    assert not [output for output in stored if output["output_type"] == "error"]
