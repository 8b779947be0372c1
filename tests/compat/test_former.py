"""What 0.1.0 wrote goes on working: runs, adapters, a comparison and a sequence of tasks (former/write.py made them).

The class paths in those files are the names of that time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from mmpeft.cli import main
from tests.compat.former.shown import HERE, images, outputs, reload, vit

RUNS = sorted(path.name for path in (HERE / "kept").iterdir())
ADAPTERS = sorted(path.name for path in (HERE / "adapters").iterdir() if path.is_dir())
TASKS = {"ImageClassifier", "FewShot", "Segmenter", "VisualQuestions", "ContrastiveTuner", "StyleTuner"}


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, and the working directory: the files in it name one another by relative paths."""
    shutil.copytree(HERE, tmp_path / "former", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(tmp_path / "former")
    return tmp_path / "former"


def assert_close(found: dict[str, torch.Tensor], said: dict[str, torch.Tensor]) -> None:
    assert found.keys() == said.keys()
    for name, value in said.items():
        error = float((found[name] - value).abs().max())
        assert error <= 1e-5 * max(1.0, float(value.abs().max())), f"{name} differs by {error}"


def steps(folder: Path) -> int:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return int(state["global_step"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_says_what_it_said_and_goes_on(name: str, former: Path) -> None:
    folder = former / "kept" / name
    task, data = reload(folder)
    assert type(task).__name__ in TASKS
    said = load_file(folder / "outputs.safetensors")
    assert_close(outputs(task, data), said)
    with mmpeft.use(task.model, None):
        plain = outputs(task, data)
    assert any((plain[key] - value).abs().max() > 1e-4 for key, value in said.items())  # the adapter is part of it
    own_base = name != "contrastive"  # the scale of that run trained in the base, where no adapter has it
    mmpeft.load(task.model, folder / "adapter", "again", check_base=own_base)
    with mmpeft.use(task.model, "again"):
        assert_close(outputs(task, data), said)

    done = steps(folder)
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    options = ["--trainer.max_epochs", "2", "--trainer.max_steps", str(done + 1), "--trainer.limit_val_batches", "0"]
    assert main(["fit", "-c", str(folder / "config.yaml"), "--ckpt_path", checkpoint, *options]) == 0
    assert steps(folder) == done + 1


def test_every_task_of_that_time_has_a_run() -> None:
    written = {line for run in RUNS for line in (HERE / "kept" / run / "config.yaml").read_text().split()}
    assert {word.rpartition(".")[2] for word in written} >= TASKS


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_outputs_it_gave(name: str) -> None:
    said = load_file(HERE / "adapters" / "outputs.safetensors")
    model = vit()
    model.load_state_dict(load_file(HERE / "adapters" / "base.safetensors"))
    with torch.no_grad():
        assert_close({"base": model(images())}, {"base": said["base"]})
        mmpeft.load(model, HERE / "adapters" / name)
        assert_close({name: model.eval()(images())}, {name: said[name]})
    assert (said[name] - said["base"]).abs().max() > 1e-3


def test_a_comparison_runs_nothing_again(former: Path) -> None:
    log = former / "compare" / "results.jsonl"
    before = log.read_bytes()
    assert main(["compare", "-c", "compare.yaml", "--out", "compare", "--size", "2"]) == 0
    assert log.read_bytes() == before  # a run would have added a line, its key and its seconds
    assert (former / "compare" / "table.md").is_file()


def test_a_sequence_of_tasks_goes_on_after_its_first(former: Path) -> None:
    path = former / "continual" / "begun" / "O_LoRA-0" / "record.json"
    record = json.loads(path.read_text())
    assert len(record["matrix"]) == 1
    record["matrix"] = [[0.123]]  # what is measured again would not be this
    path.write_text(json.dumps(record))
    assert main(["continual", "-c", "continual.yaml", "--out", "continual/begun"]) == 0
    (found,) = json.loads((former / "continual" / "begun" / "results.json").read_text())
    (whole,) = json.loads((former / "continual" / "whole" / "results.json").read_text())
    assert found["matrix"] == [[0.123], *whole["matrix"][1:]]
    assert found["key"] == whole["key"]
