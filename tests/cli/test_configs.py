"""Every configuration that ships is read by the command its first lines name, and what it names is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmpeft.methods import METHODS
from mmpeft.run.experiment import Experiment
from mmpeft.run.written import read_method

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
ELSEWHERE = {
    "folder.yaml": "a folder of pictures",
    "vtab.yaml": "a folder of VTAB-1k",
    "hub.yaml": "the hub",
    "style.yaml": "a folder of pictures",
    "retrieval.yaml": "a folder of pairs",
}
"""Configurations whose data are a user's own."""


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


def kind(path: Path) -> str:
    """Which command a configuration is of."""
    if path.parent.name == "method":
        return "method"
    own = content(path)
    return "continual" if "run" in own else "compare" if "methods" in own else "fit"


def of(name: str) -> pytest.MarkDecorator:
    files = [path for path in FILES if kind(path) == name]
    return pytest.mark.parametrize("path", files, ids=lambda path: str(path.relative_to(CONFIGS)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_names_its_own_command(path: Path) -> None:
    if kind(path) != "method":
        head = path.read_text("utf-8").splitlines()[:8]
        assert any(f"mmpeft {kind(path)} -c {path.relative_to(CONFIGS).with_suffix('')}" in line for line in head)


@of("method")
def test_a_method(path: Path) -> None:
    assert type(read_method(str(path))) in METHODS.values()


def test_every_method_has_one() -> None:
    named = {type(read_method(str(path))).__name__ for path in FILES if kind(path) == "method"}
    assert set(METHODS) - named <= {"Plan", "Frozen", "Union", "AdapterFusion", "Restricted", "BatchStatistics"}


@of("fit")
def test_a_run(path: Path) -> None:
    facts = content(path)
    if not facts.get("method"):
        facts["method"] = "LoRA"
    experiment = Experiment.read(facts)
    if path.name not in ELSEWHERE:
        run = experiment.build()
        assert type(run.data).__name__ in str(facts["data"]["class_path"])


@of("compare")
def test_a_comparison(path: Path) -> None:
    from mmpeft.bench.compare import KEYS, NEEDED, merged
    from mmpeft.run.study import read_file

    config = read_file(path, KEYS, NEEDED)
    for entry in config["methods"].values():
        Experiment.read(merged(config, entry, seed=0)).build()


@of("continual")
def test_a_sequence(path: Path) -> None:
    from mmpeft.run.study import read_file
    from mmpeft.vision.continual.command import KEYS, NEEDED, merged, parse

    config = read_file(path, KEYS, NEEDED)
    for entry in config["methods"].values():
        parse(merged(config, entry, seed=0))
