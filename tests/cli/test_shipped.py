"""Shipped configurations by name: listed, shown, used and written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmpeft.cli import main
from mmpeft.errors import ConfigError
from mmpeft.run.arguments import with_found_configs
from mmpeft.run.shipped import find_config, shipped

Said = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", ["vision/demo", "vision/demo.yaml", "configs/vision/demo.yaml"])
def test_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == shipped()["vision/demo"]
    assert with_found_configs(["fit", "-c", name, f"--config={name}", "--method", "LoRA"]) == [
        *("fit", "-c", str(shipped()["vision/demo"])),
        *(f"--config={shipped()['vision/demo']}", "--method", "LoRA"),
    ]


def test_a_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "demo").write_text("{}")
    assert find_config("vision/demo") == Path("vision/demo")


@pytest.mark.parametrize(
    ("name", "said"), [("vision/dmeo", "'vision/demo'"), ("demo", "'vision/demo'"), ("lora", "'method/lora'")]
)
def test_near_names_are_said(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean {said}"):
        find_config(name)


def test_listed_and_shown(capsys: Said) -> None:
    assert main(["configs", "vision/*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {name for name in shipped() if name.startswith("vision/")}
    assert all(line.partition("  ")[2].strip() for line in lines)
    assert main(["configs", "show", "method/lora"]) == 0
    assert capsys.readouterr().out == shipped()["method/lora"].read_text("utf-8")
    assert main(["configs", "nothing*"]) == 2


def test_init_writes_what_its_command_then_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "vision/emoji", "--out", "mine.yaml"]) == 0
    said = capsys.readouterr().out
    assert "mmpeft fit -c mine.yaml -c method/lora" in said
    assert yaml.safe_load(Path("mine.yaml").read_text()) == yaml.safe_load(shipped()["vision/emoji"].read_text())
    assert main(["init", "vision/emoji", "--out", "mine.yaml"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["init", "ImageClassifier"]) == 2
    assert "mmpeft init vision/folder" in capsys.readouterr().err
    assert main(["init", "DepthEstimator"]) == 0
    assert Path("depth.yaml").is_file()
