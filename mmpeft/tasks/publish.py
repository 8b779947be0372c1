"""Where a run shows what it made: its folder, and TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from mmpeft.files import write_atomic
from mmpeft.types import Untyped


def run_folder(trainer: Trainer) -> Path:
    """Where a run writes. All processes must ask: `log_dir` is broadcast."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def folder_of(trainer: Trainer) -> Path | None:
    """The run's folder, or None where nothing is to be written: on other processes, in a dry run, without a folder.

    All processes must call it: `log_dir` is broadcast.
    """
    folder = run_folder(trainer)
    nowhere = not trainer.loggers and folder.resolve() == Path.cwd()  # Lightning's stand-in for no folder at all
    dry = getattr(trainer, "fast_dev_run", False)
    return folder if trainer.is_global_zero and not (dry or nowhere) else None


def tensorboard(trainer: Trainer) -> Untyped:
    """TensorBoard's writer, if the run has one and this process writes; None else."""
    if not trainer.is_global_zero:
        return None
    found = (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
    return next((logger.experiment for logger in found), None)


class Board:
    """What a run shows goes here: its folder, and TensorBoard."""

    def __init__(self, trainer: Trainer, folder: Path | None) -> None:
        self.trainer, self.folder = trainer, folder

    @classmethod
    def of(cls, trainer: Trainer) -> Board | None:
        """The board of a run; None where nobody keeps pictures. All processes must ask: see `folder_of`."""
        folder = folder_of(trainer)
        return cls(trainer, folder) if trainer.is_global_zero and trainer.loggers else None

    def publish(self, png: bytes, file: str, tag: str) -> None:
        """Write a picture to `file` in the run's folder, and add it to TensorBoard under `tag`."""
        if self.folder is not None:
            write_atomic(self.folder / file, png)
        writer = tensorboard(self.trainer)
        if writer is not None:
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            writer.add_image(tag, pixels, self.trainer.global_step, dataformats="HWC")
