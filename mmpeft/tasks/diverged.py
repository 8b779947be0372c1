"""Stops a run that has diverged: the step is named, and no checkpoint or adapter is written over a good one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from mmpeft.errors import DivergedError
from mmpeft.types import Batch, Output, StateDict

if TYPE_CHECKING:
    from mmpeft.tasks.module import TuningModule

PATIENCE = 20
"""Losses in a row that may be infinite under a gradient scaler, which leaves out such steps and scales less."""


class StopsDiverged(Callback):
    """Looks at every loss, and at everything that trains before it is saved.

    On a GPU losses are read where Lightning logs, so that no step waits for them; the step that is named is the first
    that was wrong all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first: Tensor | None = None
        self._row = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first, self._row = None, 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach()
        if loss.device.type == "cpu":
            self._row = 0 if torch.isfinite(loss).all() else self._row + 1
            if self._row > _patience(trainer):
                raise _error(trainer, trainer.global_step + 1 - _patience(trainer), f"the loss is {float(loss)}")
            return
        if self._first is None:
            self._first = torch.full((), -1, dtype=torch.int64, device=loss.device)
        wrong = torch.where(self._first < 0, trainer.global_step + 1, self._first)
        self._first = torch.where(torch.isfinite(loss).all(), torch.full_like(self._first, -1), wrong)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        if self._first is not None and trainer.global_step % max(1, getattr(trainer, "log_every_n_steps", 1)) == 0:
            self._read(trainer)

    def _read(self, trainer: Trainer) -> None:
        step = -1 if self._first is None else int(self._first)
        if 0 <= step <= trainer.global_step - _patience(trainer):
            raise _error(trainer, step, "the loss is not finite")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        if not trainer.training:
            return
        self._read(trainer)
        for name, tensor in cast("TuningModule", pl_module).trainable():
            if not torch.isfinite(tensor).all():
                raise _error(trainer, trainer.global_step, f"{name} holds NaN or infinity")


def _patience(trainer: Trainer) -> int:
    return PATIENCE if getattr(trainer.precision_plugin, "scaler", None) is not None else 0


def _error(trainer: Trainer, step: int, why: str) -> DivergedError:
    files = [Path(p) for c in trainer.checkpoint_callbacks for p in _paths(c) if p and Path(p).is_file()]
    good = max(files, key=lambda file: file.stat().st_mtime, default=None)
    kept = f"The last good state is {good}" if good else "There is no earlier checkpoint"
    precision = "; fp16 overflows where bf16 does not" if str(trainer.precision).startswith("16-") else ""
    return DivergedError(
        f"training diverged at step {step} (epoch {trainer.current_epoch}): {why}. {kept}; nothing was written over "
        f"it. Train with a smaller learning rate, more warm-up or gradient clipping{precision}"
    )


def _paths(callback: Checkpoint) -> list[str]:
    kept = getattr(callback, "best_k_models", {})
    found = list(kept) if isinstance(kept, Mapping) else []
    return [*found, getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", "")]
