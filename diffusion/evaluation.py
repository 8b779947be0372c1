"""What a tuned pipeline draws for prompts it never saw, beside the base and beside real drawings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor

from mmpeft.diffusion.grid import labelled_grid
from mmpeft.diffusion.judge import Judge
from mmpeft.files import write_atomic
from mmpeft.training.callbacks import folder_of

ROWS = 8
"""Prompts in the picture."""


@dataclass
class Drawn:
    """Images of one kind for the prompts of a test, batch by batch."""

    images: list[Tensor] = field(default_factory=list)

    def add(self, images: Tensor) -> None:
        self.images.append(images.detach().cpu())

    def all(self) -> Tensor:
        """All of them, [n, 3, H, W] in [0, 1]."""
        return torch.cat(self.images)


class StyleTest(Callback):
    """Draws every prompt of the test set by the base and by the tuned model, from the same noise, and judges both.

    Logged for each: the share taken for the style, the share taken for the prompt's category, and the kernel distance
    to drawings by hand; `real/` has the evaluators' ceiling. Where a batch has prompts that do not ask for the style
    (`plain`), the same of them says what the tuning changed there. Written is `test.png`.
    """

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.drawn: dict[str, Drawn] = {}
        self.prompts: list[str] = []
        self.labels: list[Tensor] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        for name, images in outputs.items():
            self.drawn.setdefault(name, Drawn()).add(images)
        self.prompts += list(batch["prompt"])
        if "label" in batch:
            self.labels.append(batch["label"].cpu())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images = {name: drawn.all() for name, drawn in self.drawn.items()}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "judge"):
            scores = judged(data.judge(), images, torch.cat(self.labels), data.style)
            pl_module.log_dict(scores)
        folder = folder_of(trainer)
        if folder:
            shown = {name: images[name][:ROWS] for name in ("base", "test", "real")}
            titles = {"base": "base", "test": "tuned", "real": "drawn by hand"}
            png = labelled_grid({titles[name]: own for name, own in shown.items()}, self.prompts[:ROWS])
            write_atomic(folder / "test.png", png)
            Console().print(f"drawings: {folder / 'test.png'}", soft_wrap=True)


def judged(judge: Judge, images: dict[str, Tensor], labels: Tensor, style: str) -> dict[str, float]:
    """Scores `<kind>/<measure>` of images by kind, those drawn by hand being `real` and `plain_real`."""
    found: dict[str, float] = {}
    for name, own in images.items():
        for measure, value in judge.accuracy(own, style, labels).items():
            found[f"{name}/{measure}"] = value
        if not name.endswith("real"):
            real = images["plain_real" if name.startswith("plain") else "real"]
            found[f"{name}/kid"], found[f"{name}/kid_spread"] = judge.kid(own, real)
    return found
