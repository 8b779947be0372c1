"""A domain of somebody else's: a backbone, a task, data and a command, found by its entry point alone."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from mmpeft.cli import main

HOME = Path(__file__).parents[1] / "third_party"


@pytest.fixture
def tones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.syspath_prepend(HOME)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "tones"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_run_from_training_to_its_own_command(tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--model", "ToneClassifier", "--data", "ToneData", "--data.samples", "16", "--trainer.accelerator", "cpu"]
    run += ["--method", "LoRA(rank=2, at='attn.*')", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "no"]
    assert main(["fit", *run]) == 0
    folder = tones / "runs" / "ToneData-LoRA"
    assert main(["predict", *run, "--ckpt_path", "last"]) == 0
    (file,) = folder.rglob("tones.csv")
    rows = list(csv.DictReader(file.open()))
    assert [row["path"] for row in rows] == [f"tone {i}" for i in range(16)]
    capsys.readouterr()
    assert main(["hear", str(folder)]) == 0
    assert capsys.readouterr().out.strip().split(", ") == [row["class"] for row in rows]


def test_its_backbone_and_its_command_have_names(tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "tonenet_small", "--method", "Houlsby"]) == 0
    assert "attn.q" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "name the tones" in capsys.readouterr().out
    assert main(["heer"]) == 2
    assert "Did you mean 'hear'" in capsys.readouterr().err


def test_two_domains_of_one_name_are_told(tones: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    import tones as domain

    monkeypatch.setitem(domain.TASKS, "ImageClassifier", "tones.task:ToneClassifier")
    assert main(["fit", "--model", "ImageClassifier"]) == 2
    assert "one must be renamed" in capsys.readouterr().err  # type: ignore[attr-defined]
