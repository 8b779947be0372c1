"""What a tuned pipeline draws for prompts it never saw, beside the base and beside real images, judged."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor
from torch.utils.data import default_collate

from mmpeft.data.pixels import png_of_pixels
from mmpeft.diffusion.style.grid import Show, labelled_grid
from mmpeft.diffusion.style.judge import Judge, judged
from mmpeft.files import write_atomic
from mmpeft.run.callbacks import draw, rows_before, to_csv
from mmpeft.tasks.predictions import PredictionFolder
from mmpeft.tasks.publish import folder_of
from mmpeft.types import AnyModule, Batch, Fields, Output, Untyped

ROWS = 8
"""Prompts in the picture."""
TITLES = {"base": "base", "test": "tuned", "real": "drawn by hand"}
SCORES = "scores.csv"


def predicted() -> PredictionFolder:
    """Writes what a task draws for prompts of one's own."""
    return PredictionFolder(
        "drawings",
        lambda outputs: ((f"{n}.png", png_of_pixels(image)) for n, image in zip(outputs["name"], outputs["images"])),
        lambda: "",
    )


class Drawn:
    """Images by kind with what is known of their prompts, batch by batch.

    Kinds are `real`, `base` and `test`; where a batch has prompts that do not ask for the style (`plain`), also
    `plain_base` and `plain`, and `plain_real` where it has images of those.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.prompts: list[str] = []
        self.plain: list[str] = []
        self.labels: list[Tensor] = []

    def add(self, images: dict[str, Tensor], batch: Fields) -> None:
        """Keep the images drawn for a batch."""
        for kind, own in images.items():
            self.parts.setdefault(kind, []).append(own.detach().cpu())
        self.prompts += list(batch["prompt"])
        self.plain += list(batch.get("plain", ()))
        if "label" in batch:
            self.labels.append(batch["label"].cpu())

    def images(self) -> dict[str, Tensor]:
        """All of them by kind, [n, 3, H, W] in [0, 1]."""
        return {kind: torch.cat(parts) for kind, parts in self.parts.items()}

    def scores(self, judge: Judge) -> dict[str, float]:
        """What an evaluator makes of every kind."""
        prompts = {kind: self.plain if kind.startswith("plain") else self.prompts for kind in self.parts}
        return judged(judge, self.images(), prompts, torch.cat(self.labels) if self.labels else None)


class StyleTest(Callback):
    """Draws every prompt of the test set by the base and by the tuned model, from the same noise, and judges both.

    Logged are the data's evaluator's scores for each kind; `real/` has its ceiling. Written is `test.png`.
    """

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.drawn, self.judge = Drawn(), judge_of(trainer)  # an evaluator that is not there is no news for the end

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Output, batch: Batch, *rest: object
    ) -> None:
        self.drawn.add(outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.judge is not None:
            pl_module.log_dict(self.drawn.scores(self.judge))
        folder = folder_of(trainer)
        if folder:
            images = self.drawn.images()
            columns = {title: images[kind][:ROWS] for kind, title in TITLES.items()}
            write_atomic(folder / "test.png", labelled_grid(columns, self.drawn.prompts[:ROWS]))
            Console().print(f"drawings: {folder / 'test.png'}", soft_wrap=True)


class StyleScores(Callback):
    """While it trains: judges drawings for validation prompts with each grid; `scores.csv` and `scores.png`.

    The prompts, spread over the validation set, and the noise are the same each time; what the base draws is judged
    once. Named as in a test, with `val/` for the tuned model. What is drawn changes nothing of what is trained.
    """

    def __init__(self, show: Show) -> None:
        self.show = show
        self.rows: list[dict[str, float]] = []
        self._last, self._fixed = -1, dict[str, Tensor]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.show.num_validation_images:
            folder = folder_of(trainer)
            self.rows = rows_before(folder / SCORES, trainer.global_step) if folder and trainer.global_step else []
            self._judge = judge_of(trainer) if folder else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        if (
            trainer.global_step % self.show.every == 0
            and trainer.global_step != self._last
            and self.show.num_validation_images
        ):
            self._last = trainer.global_step
            folder = folder_of(trainer)
            with torch.random.fork_rng():
                scores = self._scores(pl_module) if folder else {}
            pl_module.log_dict(scores, rank_zero_only=True)
            if folder and scores:
                self.rows.append({"step": trainer.global_step, **scores})
                self._write(folder)

    def _scores(self, module: AnyModule) -> dict[str, float]:
        known = module.datamodule.val_set
        if self._judge is None or not known:
            return {}
        count = min(self.show.num_validation_images, len(known))
        batch = default_collate([known[i * len(known) // count] for i in range(count)])
        drawn = Drawn()
        images = module.drawings(batch, range(count), base=not self._fixed)
        self._fixed = self._fixed or {kind: own for kind, own in images.items() if kind not in ("test", "plain")}
        drawn.add({**self._fixed, **images}, batch)
        return {name.replace("test/", "val/"): value for name, value in drawn.scores(self._judge).items()}

    def _write(self, folder: Path) -> None:
        write_atomic(folder / SCORES, to_csv(self.rows).encode())
        shown = [{name: value for name, value in row.items() if not name.endswith("spread")} for row in self.rows]
        picture = draw(shown)
        if picture:
            write_atomic(folder / "scores.png", picture)


def judge_of(trainer: Trainer) -> Judge | None:
    """The evaluator of a run's data; None where they have none."""
    data: Untyped = getattr(trainer, "datamodule", None)
    found: Judge | None = data.judge() if hasattr(data, "judge") else None
    return found
