"""Which classes a command line names, and how a method is written there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmpeft.errors import ConfigError
from mmpeft.run.arguments import class_names, reset_changed_methods
from mmpeft.run.written import as_class, read_method, spelled_out


def test_classes_are_named_by_values_files_and_mappings(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "title: FewShot\nmodel: {class_path: mmpeft.vla.Segmenter, init_args: {decoder: SANDecoder}}\n"
        "trainer: {callbacks: [{class_path: WiseCurve}]}\n"
    )
    arguments = ["-c", str(file), "--data=EmojiData", "--model.head", '{"class_path": "TaskRes"}', "--x", "{not: [yaml"]
    assert class_names(arguments) >= {"Segmenter", "SANDecoder", "WiseCurve", "EmojiData", "TaskRes"}
    assert "FewShot" not in class_names(arguments)  # a title is no class


def test_no_yaml_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="is no YAML"):
        class_names(["-c", str(file)])


@pytest.mark.parametrize("arguments", [["--method", "LoRA(rank=2)"], ["--method=LoRA(rank=2)"]])
def test_a_method_written_as_a_call_becomes_a_class_and_starts_afresh(arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("method: {class_path: DoRA, init_args: {at: mlp.*}}\n")
    changed = reset_changed_methods(["-c", str(file), *arguments])
    assert changed[2:4] == ["--method", "null"]
    value = changed[-1].removeprefix("--method=")
    assert json.loads(value) == as_class(read_method("LoRA(rank=2)"))


def test_names_and_classes_stay_as_they_are_written() -> None:
    content = {"method": "LoRA", "model": {"init_args": {"method": {"class_path": "BitFit"}}}, "title": "a + b(c)"}
    assert spelled_out(content) == content
    assert spelled_out({"method": "LoRA(rank=2)"})["method"]["init_args"]["rank"] == 2
