"""A progress bar that knows how far the whole run is, whether it counts epochs or steps."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from mmpeft.types import Batch, Output


class RunBar(RichProgressBar):
    """Epochs as Lightning shows them; a run of `max_steps` has one bar over all its steps, with the time left."""

    @property
    def by_steps(self) -> bool:
        """Whether steps end the run, and no number of epochs does."""
        return self.trainer.max_steps > 0 and (self.trainer.max_epochs or -1) < 0

    @property
    def total_train_batches(self) -> int | float:
        if self.by_steps:
            return self.trainer.max_steps
        return super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        if self.by_steps:
            return f"Epoch {current_epoch}"
        return super()._get_train_description(current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.by_steps or self.train_progress_bar_id is None or self.progress is None:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self.progress.update(
                self.train_progress_bar_id, description=self._get_train_description(trainer.current_epoch)
            )
        if self.by_steps:
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        super().on_train_batch_end(
            trainer, pl_module, outputs, batch, trainer.global_step - 1 if self.by_steps else batch_idx
        )
