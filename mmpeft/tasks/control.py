"""Drives a tuning's controllers from Lightning, by the same six moments as a plain loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from mmpeft.controllers import Controllers
from mmpeft.methods.spec import to_spec
from mmpeft.types import Batch, Output, StateDict

if TYPE_CHECKING:
    from mmpeft.tasks.module import TuningModule

METHOD = "method"
"""Key of a checkpoint: the method that scoring by data has led to, so that a resumed run scores nothing."""


class Control(Callback):
    """Calls the controllers, logs their values as curves, and keeps their state in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self._controllers: Controllers | None = None
        self._waiting: StateDict | None = None
        self._steps = 0

    def of(self, pl_module: LightningModule) -> Controllers:
        return cast("TuningModule", pl_module).prepare().controllers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._controllers = self.of(pl_module)
        if self._waiting is not None:
            self._controllers.load_state_dict(self._waiting)
            self._waiting = None
        self._steps = trainer.global_step
        if self._controllers:
            self._controllers.fit_start(int(trainer.estimated_stepping_batches))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.of(pl_module).before_forward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.of(pl_module).after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.of(pl_module).before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:  # gradients are still being accumulated
            return
        self._steps = trainer.global_step
        controllers = self.of(pl_module)
        controllers.after_step()
        if values := controllers.values():
            pl_module.log_dict({f"control/{name}": value.float() for name, value in values.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.of(pl_module).fit_end()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        task = cast("TuningModule", pl_module)
        if not task.method.decided:
            checkpoint[METHOD] = to_spec(task.prepare().method)

    def state_dict(self) -> StateDict:
        return self._controllers.state_dict() if self._controllers else {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        self._waiting = state_dict or None
