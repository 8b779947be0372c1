"""What every task of every domain keeps, whatever it is: generated from the domains' tables."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from mmpeft.data.loading import DataModule
from mmpeft.errors import ConfigError, DataError
from mmpeft.run.checkpoint import LastCheckpoint
from mmpeft.run.domains import table
from mmpeft.run.experiment import Experiment, Run
from mmpeft.tasks.module import TuningModule
from mmpeft.tasks.pretraining import WritesWeights
from mmpeft.tasks.task import Task
from tests.support.task_examples import EXAMPLES, PRETRAINING, write_pairs

LIMITS: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
}


def built(name: str, folder: Path, *callbacks: Callback, **trainer: Any) -> Run:
    facts = copy.deepcopy({**EXAMPLES, **PRETRAINING}[name])
    options = {**Experiment.quiet, **LIMITS, "default_root_dir": str(folder), **trainer}
    run = Experiment.read({**facts, "trainer": options}).build()
    run.trainer.callbacks.extend(callbacks)
    return run


def trained(task: TuningModule) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in task.trainable()}


class Start(Callback):
    """Keeps the values that training begins with."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.values = trained(pl_module)


class Finished(NamedTuple):
    name: str
    folder: Path
    run: Run
    before: dict[str, Tensor]


@pytest.fixture(scope="module", params=sorted(EXAMPLES))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run of two epochs of one batch, with its last checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    write_pairs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start = Start()
        run = built(request.param, folder, LastCheckpoint(dirpath=str(folder)), start)
        run.trainer.fit(run.task, datamodule=run.data)
        yield Finished(request.param, folder, run, start.values)


def test_every_task_is_here() -> None:
    assert set(table("TASKS")) == {*EXAMPLES, *PRETRAINING}


def test_fits_and_moves_what_it_trains(finished: Finished) -> None:
    run, before = finished.run, finished.before
    after = trained(run.task)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert any(key.startswith("val/") for key in run.trainer.callback_metrics)


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(finished: Finished) -> None:
    name, folder, run, _ = finished
    half = folder / "half"
    whole = built(name, half, LastCheckpoint(dirpath=str(half / "2")), max_epochs=2)
    whole.trainer.fit(whole.task, datamodule=whole.data, ckpt_path=_after_one_epoch(name, half))
    expected = trained(run.task)
    for key, tensor in trained(whole.task).items():
        assert torch.equal(tensor, expected[key]), key


def _after_one_epoch(name: str, folder: Path) -> str:
    """A checkpoint of a run of two epochs that was killed after the first."""

    class Killed(Exception):
        pass

    class Kill(Callback):
        def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise Killed

    run = built(name, folder, LastCheckpoint(dirpath=str(folder)), Kill())
    with pytest.raises(Killed):
        run.trainer.fit(run.task, datamodule=run.data)
    return str(folder / "last.ckpt")


def test_tests_and_predicts(finished: Finished) -> None:
    _, folder, run, _ = finished
    if not isinstance(run.task, Task):
        pytest.skip("its test draws for minutes: tests/tasks/test_style.py")
    scores = run.trainer.test(run.task, datamodule=run.data, verbose=False)[0]
    assert scores
    assert all(key.startswith("test/") for key in scores)
    if run.data.predict_set is None:  # type: ignore[attr-defined]
        return
    before = {path for path in folder.rglob("*") if path.is_file()}
    run.trainer.predict(run.task, datamodule=run.data, return_predictions=False)
    assert {path for path in folder.rglob("*") if path.is_file()} - before
    assert not list(folder.rglob("*.tmp"))


def test_a_checkpoint_of_another_meaning_is_refused(finished: Finished) -> None:
    _, folder, run, _ = finished
    if not run.task.meaning():
        pytest.skip("its outputs stand for themselves")
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    key = next(iter(run.task.meaning()))
    assert checkpoint[key] == run.task.meaning()[key]
    with pytest.raises(DataError, match="would be misread"):
        run.task.on_load_checkpoint({**checkpoint, key: [*checkpoint[key], "another"]})


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_bad_input_is_refused_before_compute(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data without what the task needs, and an option that there is not."""
    write_pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    facts = copy.deepcopy(EXAMPLES[name])
    facts["model"]["init_args"]["warmupp"] = 0.1
    with pytest.raises(ConfigError, match="warmupp"):
        Experiment.read(facts)
    task, _, trainer = built(name, tmp_path)
    if name not in ("DepthEstimator", "ContrastiveTuner"):  # which take any data whose batches fit
        monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("computed before the check"))
        with pytest.raises(ConfigError, match="Bare"):
            trainer.fit(task, datamodule=Bare())


class Bare(DataModule):
    """Data that know nothing of themselves."""

    def datasets(self, stage: str | None = None) -> None:
        self.train_set = [(torch.zeros(3, 64, 64), 0)] * 4  # type: ignore[assignment]


@pytest.mark.parametrize("name", sorted(PRETRAINING))
def test_pretraining_takes_a_step_and_writes_its_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task, data, trainer = built(name, tmp_path, max_epochs=1)
    trainer.fit(task, datamodule=data)
    assert isinstance(task, WritesWeights)
    assert list((tmp_path / "weights").rglob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} <= {"weights", "samples"}
