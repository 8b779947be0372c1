"""Checkpoints that survive being killed at any moment, and continue bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import distributed

from mmpeft.run.place import BEST, LAST
from mmpeft.tasks.module import TuningModule
from mmpeft.types import Batch, Output, StateDict


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`: written each epoch, or every `every_n_train_steps`, and at the end of training.

    Once `fit` is through it is written again where the task has chosen something after the last step
    (`TuningModule.resave_after_fit`), and where nothing was written: for a run of no steps.
    """

    def __init__(self, every_n_train_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=Path(LAST).stem,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        end_once(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and (getattr(pl_module, "resave_after_fit", False) or not self._last_checkpoint_saved):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not getattr(trainer, "fast_dev_run", False):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class BestCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/best.ckpt`: of the validation that was the best by the task's `monitor`.

    There is none where a task has no monitor, or nothing is validated.
    """

    def __init__(self) -> None:
        super().__init__(
            filename=Path(BEST).stem, save_top_k=1, save_on_train_epoch_end=False, enable_version_counter=False
        )

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        wanted = pl_module.monitor if isinstance(pl_module, TuningModule) else None
        if wanted is not None and self.monitor is None:
            self.monitor, self.mode = wanted
            self.kth_value = torch.tensor(float("inf" if self.mode == "min" else "-inf"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None and self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def on_train_batch_end(self, *told: object) -> None:
        """Nothing: only a validation tells which is the best."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing, as above."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing, as above."""


def end_once(trainer: Trainer) -> None:
    """Begin the next epoch where a checkpoint was written at the end of one, or of the whole run.

    A run that counts steps (`max_steps`) would end that epoch a second time: an empty epoch, and from there on the
    order of the one after. Runs that count epochs do as is done here.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
    if loop.epoch_progress.total.ready == loop.epoch_progress.total.completed:
        loop.epoch_loop.restarting = False


class RandomState(Callback):
    """Gives training steps a random stream of their own, and keeps it in checkpoints.

    The stream is put aside after each step and taken up before the next. So what happens in between (validation,
    new loader iterators, pictures) cannot shift it, and a run resumed at any step draws the same numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state: StateDict | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._state is None:
            self._state = collect()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self._state is not None:
            restore(self._state)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        self._state = collect()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        own = self._state or collect()
        ranks: list[StateDict | None] = [own]
        if distributed.is_available() and distributed.is_initialized():
            ranks = [None] * distributed.get_world_size()
            distributed.all_gather_object(ranks, own)
        checkpoint["random_state"] = ranks

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        ranks = checkpoint.get("random_state") or []
        self._state = ranks[trainer.global_rank] if trainer.global_rank < len(ranks) else None


def collect() -> StateDict:
    """The state of torch's, CUDA's, Python's and NumPy's generators, in types that load without unpickling code."""
    states: StateDict = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    states["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    return states


def restore(states: StateDict) -> None:
    """Set what `collect` returned; states of GPUs that are not here are left out."""
    name, keys, *rest = states["numpy"]
    cuda = states["torch.cuda"][: torch.cuda.device_count()] if torch.cuda.is_available() else []
    _set_rng_states({**states, "numpy": (name, keys.numpy().astype("uint32"), *rest), "torch.cuda": cuda})
