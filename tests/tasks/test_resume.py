"""A run killed at any moment continues to the same bits; a full disk loses nothing."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import mmpeft
from mmpeft import files
from mmpeft.errors import AdapterFileError, MMPEFTError
from mmpeft.run.callbacks import LearningCurves
from mmpeft.run.checkpoint import LastCheckpoint, RandomState
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from tests.support.killing import KillBefore, assert_same_bits, killed, last
from tests.tasks.tiny import TinyData, classifier, trainer


def run(
    folder: Path, kill: int | None = None, resume: bool = False, ema: bool = False, every: int | None = 1, **limits: int
) -> None:
    """Three epochs of four steps, with everything that draws random numbers in a step."""
    method = mmpeft.LoRA(rank=2, dropout=0.2)
    module = classifier(method, mixup=0.4, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    lightning.seed_everything(5, verbose=False)
    callbacks = [RandomState(), LearningCurves(), LastCheckpoint(every)]
    callbacks += [KillBefore(kill)] if kill is not None else []
    callbacks += [EMAWeightAveraging(decay=0.9)] if ema else []
    fit = trainer(folder, callbacks=callbacks, **(limits or {"max_epochs": 3}))
    fit.fit(module, TinyData(), ckpt_path="last" if resume else None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return last(folder)


@pytest.mark.parametrize("step", [2, 4, 7], ids=["mid-epoch", "between-epochs", "second-epoch"])
def test_killed_between_steps(tmp_path, whole, step):
    killed(run, tmp_path, step)
    assert last(tmp_path)["global_step"] == step
    run(tmp_path, resume=True)
    found = last(tmp_path)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "global_step", "epoch"):
        assert_same_bits(found[part], whole[part])


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 12, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("ema", [False, True], ids=["plain", "averaged"])
def test_the_usual_checkpoint_of_an_epochs_end(tmp_path: Path, limits: dict[str, int], ema: bool) -> None:
    run(tmp_path / "whole", ema=ema, every=None, **limits)
    killed(partial(run, **limits), tmp_path / "cut", 6, False, ema, None)
    assert last(tmp_path / "cut")["global_step"] == 4
    run(tmp_path / "cut", resume=True, ema=ema, every=None, **limits)
    expected, found = last(tmp_path / "whole"), last(tmp_path / "cut")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "global_step", "epoch", "loops"):
        assert_same_bits(found[part], expected[part])
    curves = [(tmp_path / name / "curves.csv").read_text() for name in ("whole", "cut")]
    assert curves[0] == curves[1]


def _die_in_save(folder: Path, save: int, call: str) -> None:
    """Die inside the given checkpoint: with half the file written, or just before the rename."""
    original, count = getattr(os, call), [0]

    def deadly(*args: Any) -> Any:
        target = str(args[-1]) if call == "replace" else os.readlink(f"/proc/self/fd/{args[0]}")
        count[0] += "/checkpoints/" in target
        if count[0] == save:
            if call == "fsync":
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(files.os, call, deadly)
    run(folder)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_saving(tmp_path, whole, call):
    killed(_die_in_save, tmp_path, 7, call)
    assert last(tmp_path)["global_step"] == 6
    run(tmp_path, resume=True)
    assert_same_bits(last(tmp_path)["state_dict"], whole["state_dict"])
    assert_same_bits(last(tmp_path)["optimizer_states"], whole["optimizer_states"])


def test_killed_with_moving_average(tmp_path):
    run(tmp_path / "whole", ema=True)
    killed(run, tmp_path / "cut", 6, False, True)
    run(tmp_path / "cut", resume=True, ema=True)
    expected, found = last(tmp_path / "whole"), last(tmp_path / "cut")
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert_same_bits(found[part], expected[part])


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MMPEFTError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_full_disk_ends_a_run_with_the_reason(tmp_path, monkeypatch):
    original = os.replace
    count = [0]

    def full(source: Any, target: Any) -> None:
        count[0] += str(target).endswith(".ckpt")
        if count[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(MMPEFTError, match=r"last\.ckpt"):
        run(tmp_path)
    assert last(tmp_path)["global_step"] == 3


def test_a_pickled_checkpoint_is_never_run(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "code": os.system}, path)
    with pytest.raises(AdapterFileError, match="plain tensors and data"):
        AtomicCheckpointIO().load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(AdapterFileError, match="no checkpoint of a training run"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(AdapterFileError, match="no checkpoint at"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
