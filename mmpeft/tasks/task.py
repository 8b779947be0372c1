"""`Task`: how well a tuned model does, what a run shows of it, and what its outputs mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from mmpeft.tasks.module import TuningModule
from mmpeft.tasks.publish import Board
from mmpeft.types import Batch, Output


class Task(TuningModule):
    """A `TuningModule` that is measured. A task says

    - `build`, `start` and `loss`: what is trained (see `TuningModule`);
    - `check`: what no batch may be;
    - `evaluate` and `results`: metrics, updated batch by batch, and their values;
    - `classified`: the class that the model names, where samples have one;
    - `draw` and `draw_inputs`: pictures of the first batch of an evaluation, and of training;
    - `meaning`: what its outputs stand for, such as the names of classes (see `TuningModule`).

    Loops, logging, files and TensorBoard are here.
    """

    headline: ClassVar[Sequence[str] | None] = None
    """Names of results that the progress bar shows; None for all."""

    def check(self, batch: Batch) -> None:
        """Raise DataError for a batch that would be misread: labels out of range. Called before each is used."""

    @abstractmethod
    def evaluate(self, batch: Batch, stage: str) -> Output:
        """Update the metrics of `stage` ("val" or "test") by a batch; `classified` and `draw` get what it returns."""

    @abstractmethod
    def results(self, stage: str) -> Mapping[str, Tensor]:
        """Values by name since the last call, from metrics that begin anew."""

    def classified(self, batch: Batch, found: Output) -> tuple[Tensor, Tensor] | None:
        """The class of each sample of an evaluated batch and the class that the model names, both int64 [B].

        `found` is what `evaluate` returned. None where a sample has no single class. A task that has them names its
        `classes`.
        """
        return None

    def draw(self, batch: Batch, found: Output, stage: str) -> Mapping[str, bytes]:
        """Pictures of an evaluation's first batch: PNG files by name."""
        return {}

    def draw_inputs(self, batch: Batch) -> Mapping[str, bytes]:
        """Pictures of the first training batch, as the model gets it: PNG files by name."""
        return {}

    # -- Lightning's hooks -----------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.current_epoch == 0:  # every sample comes by once; later epochs need no check
            self.check(batch)
            if batch_idx == 0:
                self.publish("train", lambda: self.draw_inputs(batch))

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.check(batch)

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.check(batch)

    def validation_step(self, batch: Batch, index: int) -> Output:
        return self._measured(batch, index, "val")

    def test_step(self, batch: Batch, index: int) -> Output:
        return self._measured(batch, index, "test")

    def _measured(self, batch: Batch, index: int, stage: str) -> Output:
        found = self.evaluate(batch, stage)
        if index == 0:
            self.publish(stage, lambda: self.draw(batch, found, stage))
        return found

    def publish(self, stage: str, draw: Callable[[], Mapping[str, bytes]]) -> None:
        """Put pictures into `<name>/<stage>.png` of the run's folder, of validation each epoch, and on TensorBoard.

        They are drawn where somebody keeps them. All processes must call it.
        """
        board = None if self.trainer.sanity_checking else Board.of(self.trainer)
        if board is not None:
            file = f"{stage}_{self.current_epoch:03d}" if stage == "val" else stage
            for name, png in draw().items():
                board.publish(png, f"{name}/{file}.png", f"{stage}/{name}")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, stage: str) -> None:
        for name, value in self.results(stage).items():
            self.log(f"{stage}/{name}", value, prog_bar=self.headline is None or name in self.headline, sync_dist=True)
