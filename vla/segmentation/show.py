"""Where a segmentation run puts its pictures: the run's folder and TensorBoard; predictions as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from rich.console import Console
from torch import Tensor

from mmpeft.files import write_atomic
from mmpeft.tasks.publish import folder_of
from mmpeft.vla.segmentation.picture import overlays

if TYPE_CHECKING:
    from mmpeft.vla.segmentation.task import Segmenter


def show(task: Segmenter, pictures: Tensor, truth: Tensor, found: Tensor, stage: str) -> None:
    """Write `masks/<stage>.png`, for validation with the epoch, and add it to TensorBoard; nothing without a logger."""
    if not task.trainer.is_global_zero or not task.trainer.loggers:
        return
    seen = len(task.classes) - task.unseen
    names = [name if i < seen else f"{name} (unseen)" for i, name in enumerate(task.classes)]
    png = overlays(pictures, [truth, found], names)
    folder = folder_of(task.trainer)
    if folder:
        name = f"{stage}_{task.current_epoch:03d}" if stage == "val" else stage
        write_atomic(Path(folder) / "masks" / f"{name}.png", png)
    for logger in task.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            array = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            logger.experiment.add_image(f"{stage}/masks", array, task.global_step, dataformats="HWC")


class SegmentWriter(Callback):
    """Writes `segments/<name>.png`, the picture with its segments, and `segments/<name>_classes.png`, class numbers."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        folder = self.folder(trainer)
        for name, picture, mask in zip(outputs["id"], outputs["pictures"], outputs["masks"]):
            write_atomic(folder / f"{name}.png", overlays(picture, [mask], module.classes))
            write_atomic(folder / f"{name}_classes.png", index_png(mask[0]))

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        Console().print(f"segments: {self.folder(trainer)} (number {len(module.classes)}: none)", soft_wrap=True)

    def folder(self, trainer: Trainer) -> Path:
        """Where the files go."""
        return Path(trainer.log_dir or trainer.default_root_dir) / "segments"


def index_png(mask: Tensor) -> bytes:
    """Class numbers [H, W] below 256 as a grey PNG."""
    out = io.BytesIO()
    Image.fromarray(mask.to(torch.uint8).cpu().numpy()).save(out, format="PNG")
    return out.getvalue()
