"""A run that diverges stops by name, and leaves the last good state; two runs that start together have two folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

import mmpeft
from mmpeft.cli import main
from mmpeft.errors import DivergedError
from mmpeft.run.callbacks import LearningCurves, Outcome
from mmpeft.run.checkpoint import LastCheckpoint
from mmpeft.run.cli import new_version
from tests.support.killing import FORK
from tests.support.task_examples import VIT, of
from tests.tasks.tiny import TinyData, classifier, trainer


class Spoils(Callback):
    """Makes what trains infinite, or a loss NaN, at a step."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1 and self.what == "loss":
            batch[0].fill_(float("nan"))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and self.what == "weight":
            with torch.no_grad():
                next(pl_module.tuning.parameters()).view(-1)[0] = float("inf")


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_stops_at_the_step_and_keeps_the_last_good_state(tmp_path: Path, what: str) -> None:
    module = classifier(mmpeft.LoRA(rank=2))
    callbacks = [LearningCurves(), LastCheckpoint(1), Outcome(), Spoils(6, what)]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=3)
    with pytest.raises(DivergedError, match=r"diverged at step 6 \(epoch 1\).*last good state is .*last\.ckpt"):
        run.fit(module, TinyData())
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())
    assert not (tmp_path / "adapter").exists()
    again = classifier(mmpeft.LoRA(rank=2))
    fit = trainer(tmp_path, callbacks=[LastCheckpoint(1), Outcome()], max_epochs=3)
    fit.fit(again, TinyData(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert fit.global_step == 12


def test_the_very_last_step(tmp_path: Path) -> None:
    module = classifier(mmpeft.LoRA(rank=2))
    run = trainer(tmp_path, callbacks=[LastCheckpoint(), Outcome(), Spoils(4, "weight")], max_epochs=1)
    with pytest.raises(DivergedError, match="step 4"):
        run.fit(module, TinyData())
    assert not list(tmp_path.rglob("adapter*"))
    assert not list(tmp_path.rglob("last.ckpt"))


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = of("ImageClassifier", backbone=VIT, optimizer=of("torch.optim.SGD", lr=1e30))
    fit = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    run = {"model": model, "data": of("EmojiData", shots=1, batch_size=4), "trainer": {**fit, **quiet}}
    Path("fit.yaml").write_text(yaml.safe_dump({**run, "method": "LoRA"}))
    assert main(["fit", "-c", "fit.yaml"]) == 2
    assert "training diverged at step 2" in capsys.readouterr().err
    assert not list(Path("runs").rglob("adapter.json"))
    study = {
        "metric": "test/accuracy",
        "seeds": [0],
        "methods": {"wild": {"method": "LoRA"}, "calm": {"method": "LoRA"}},
    }
    study["methods"]["calm"]["lr"] = 1e-3  # type: ignore[index]  # a mapping of mappings
    run["trainer"] = {**fit, "limit_test_batches": 1}
    Path("compare.yaml").write_text(yaml.safe_dump({**study, **run}))
    assert main(["compare", "-c", "compare.yaml", "--out", "out"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not in the table: wild" in shown
    assert "calm" in Path("out/table.md").read_text()


def reserve(folder: Path, times: int) -> None:
    for _ in range(times):
        new_version(folder)


def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path) -> None:
    together = [FORK.Process(target=reserve, args=(tmp_path, 20)) for _ in range(4)]
    for process in together:
        process.start()
    for process in together:
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 80
    assert new_version(tmp_path, reserve=False) == 80
    assert not (tmp_path / "version_80").exists()
