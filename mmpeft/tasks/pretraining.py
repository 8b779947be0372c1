"""What pretraining tasks share: the whole model trains, and is written with a card when training ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from torch import nn

from mmpeft.tasks.module import TuningModule
from mmpeft.tasks.publish import run_folder
from mmpeft.types import Json


class WritesWeights(TuningModule):
    """A task that writes its model, unless training was stopped before its end."""

    name: str
    """Of what is written."""
    folder: str | Path | None = None
    """Where it is written; None for `weights` in the run's folder."""
    seen: ClassVar[str]
    """What data the model has seen, for its card."""

    def target(self) -> Path:
        """The folder to write into. All processes must ask: the run's folder is broadcast."""
        if self.folder is not None:
            return Path(self.folder)
        return run_folder(self.trainer) / "weights"

    def card(self) -> Json:
        """What is known of the weights: name, data, how long they were trained, and the last metrics."""
        return {
            "name": self.name,
            "data": self.seen,
            "steps": self.trainer.global_step,
            "epochs": self.trainer.current_epoch,
            "metrics": {key: round(float(value), 4) for key, value in self.trainer.callback_metrics.items()},
        }

    @abstractmethod
    def write(self, folder: Path, card: Json) -> None:
        """Write the model, what was tuned merged into it (see `merged`)."""

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """The backbone with what was tuned merged into it, for as long."""
        tuning = self.prepare()
        tuning.merge()
        try:
            yield tuning.model
        finally:
            tuning.unmerge()

    def on_train_end(self) -> None:
        stopped = self.trainer.interrupted or self.trainer.received_sigterm or self.trainer.sanity_checking
        folder = self.target()
        if stopped or not self.trainer.is_global_zero:
            return
        self.write(folder, self.card())
