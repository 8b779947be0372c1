"""The validation grid: the same noise and prompts, from the base to beyond what was tuned."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from mmpeft.errors import ConfigError, Refused, renamed
from mmpeft.files import png_of, write_atomic
from mmpeft.tasks.publish import folder_of
from mmpeft.types import AnyModule

if TYPE_CHECKING:
    from mmpeft.diffusion.style.task import StyleTuner


@dataclass(frozen=True)
class Show:
    """What is drawn while training goes on.

    Args:
        prompts: one row each; empty for no grid.
        every: optimiser steps between two grids; one more is drawn at the end.
        strengths: one column each: 0 is the base, 1 what was tuned. Methods without a strength show 0 and 1.
        steps: denoising steps.
        guidance: guidance scale.
        seed: of the noise, the same in each grid.
        num_validation_images: prompts of the validation set that are drawn with each grid and scored by the data's
            evaluator; 0 for none, and where the data have none.
        judged: deprecated name of `num_validation_images`.
    """

    prompts: Sequence[str] = field(default_factory=tuple)
    every: int = 200
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 1.5)
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    num_validation_images: int = 0
    judged: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.steps < 1:
            raise ConfigError(f"every and steps are numbers >= 1, got {self.every} and {self.steps}")
        if self.judged is not None:
            renamed("Show.judged", "num_validation_images")
            object.__setattr__(self, "num_validation_images", self.judged)
            object.__setattr__(self, "judged", None)
        count = self.num_validation_images
        if count < 0 or 0 < count < 4:
            raise ConfigError(f"num_validation_images is a number of prompts, 4 or more, or 0 for none, got {count}")


class StrengthGrid(Callback):
    """Writes `grids/<step>.png` every so many steps and when training ends, and adds it to TensorBoard."""

    def __init__(self, show: Show) -> None:
        self.show = show
        self._last = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        if trainer.global_step % self.show.every == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, module: AnyModule) -> None:
        if not self.show.prompts or trainer.global_step in (0, self._last):
            return
        self._last = trainer.global_step
        folder = folder_of(trainer)
        if folder is None:
            return
        with torch.random.fork_rng():  # what is shown changes nothing of what is trained
            png = strength_grid(module, self.show)
        write_atomic(folder / "grids" / f"{trainer.global_step:06d}.png", png)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
                logger.experiment.add_image("val/grid", picture, trainer.global_step, dataformats="HWC")


def strength_grid(task: StyleTuner, show: Show) -> bytes:
    """A PNG of prompts × strengths, one noise a prompt."""
    columns: dict[str, Tensor] = {}
    for share in show.strengths:
        try:
            columns[f"strength {share:g}" if share else "base"] = task.draw(show.prompts, share)
        except Refused:
            continue
    return labelled_grid(columns, show.prompts)


def labelled_grid(columns: dict[str, Tensor], rows: Sequence[str]) -> bytes:
    """A PNG of images: a column for each entry, [rows, 3, H, W] in [0, 1], under its name; row names at the left."""
    from matplotlib.figure import Figure

    side = 1.3
    figure = Figure(figsize=(side * len(columns) + 1.6, side * len(rows) + 0.3), dpi=110, layout="constrained")
    cells = figure.subplots(len(rows), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        for row, image in enumerate(images.permute(0, 2, 3, 1)):
            cell = cells[row][column]
            cell.imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            for spine in cell.spines.values():
                spine.set_visible(False)
            if row == 0:
                cell.set_title(title, fontsize=9)
            if column == 0:
                name = rows[row] if len(rows[row]) < 24 else f"{rows[row][:22]}…"
                cell.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return png_of(figure)
