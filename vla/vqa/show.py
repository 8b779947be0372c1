"""Where a run puts what it answered: pictures in its folder and in TensorBoard, predictions in a file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from rich.console import Console
from torch import Tensor, distributed

from mmpeft.files import write_atomic
from mmpeft.tasks.publish import folder_of
from mmpeft.vla.vqa.picture import answered


def show(trainer: Trainer, images: Tensor, lines: Sequence[tuple[str, str, str]], stage: str) -> None:
    """Write `answers/<stage>.png`, for validation with the epoch, and add it to TensorBoard; no logger, no picture."""
    if not trainer.is_global_zero or not trainer.loggers:
        return
    png = answered(images, lines)
    folder = folder_of(trainer)
    if folder:
        name = f"{stage}_{trainer.current_epoch:03d}" if stage == "val" else stage
        write_atomic(Path(folder) / "answers" / f"{name}.png", png)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            array = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            logger.experiment.add_image(f"{stage}/answers", array, trainer.global_step, dataformats="HWC")


class AnswerWriter(Callback):
    """Writes `answers.jsonl` into the run's folder, a line `{"id", "question", "answers": {answer: p}}` a question."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.lines = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.lines += outputs

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        parts: list[Any] = [self.lines]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            distributed.all_gather_object(parts, self.lines)
        path = Path(trainer.log_dir or trainer.default_root_dir) / "answers.jsonl"
        if trainer.is_global_zero:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for part in parts for line in part)
            write_atomic(path, text.encode())
            Console().print(f"answers: {path}", soft_wrap=True)
