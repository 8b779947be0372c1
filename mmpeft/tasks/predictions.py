"""Predictions as a file: one line an image, with its path, class, probability, runners-up and all probabilities."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from mmpeft.errors import ConfigError, MMPEFTError


class PredictionWriter(Callback):
    """Streams what `predict_step` returns (`{"id": [...], "probabilities": [B, C]}`) to a CSV or JSONL file.

    Lines go to a temporary file, renamed when all is predicted: the file is whole or absent. With several
    processes, those of rank 0 come first.
    """

    def __init__(self, path: str = "predictions.csv", top: int = 5) -> None:
        super().__init__()
        if Path(path).suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"predictions are written as .csv or .jsonl, got {path!r}")
        self.path, self.top = path, top
        self._target = Path(path)
        self._file: Any = None

    def _part(self, rank: int) -> Path:
        return self._target.with_name(f".{self._target.name}.{rank}.tmp")

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        # asked once, by all processes: `log_dir` is broadcast
        self._target = Path(trainer.log_dir or trainer.default_root_dir) / self.path
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part(trainer.global_rank).open("w", newline="", encoding="utf-8")
        if self._target.suffix == ".csv" and trainer.is_global_zero:
            csv.writer(self._file).writerow(header(module.classes, self.top))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        table = csv.writer(self._file)
        try:
            for name, row in zip(outputs["id"], outputs["probabilities"]):
                if self._target.suffix == ".csv":
                    table.writerow(csv_row(name, row, module.classes, self.top))
                else:
                    self._file.write(json.dumps(record(name, row, module.classes, self.top), ensure_ascii=False) + "\n")
        except OSError as error:
            raise MMPEFTError(f"cannot write {self._target}: {error}") from error

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MMPEFTError(f"cannot write {self._target}: {error}") from error
        self._file.close()
        self._file = None
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        first, *others = (self._part(rank) for rank in range(trainer.world_size))
        with first.open("ab") as file:
            for part in others:
                file.write(part.read_bytes())
                part.unlink()
        os.replace(first, self._target)
        Console().print(f"predictions: {self._target}", soft_wrap=True)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
            self._part(trainer.global_rank).unlink(missing_ok=True)


def header(classes: Sequence[str], top: int) -> list[str]:
    """Column names of the CSV file."""
    ranks = range(2, min(top, len(classes)) + 1)
    runners = [column for k in ranks for column in (f"class_{k}", f"probability_{k}")]
    return ["path", "class", "probability", *runners, *(f"p({name})" for name in classes)]


def csv_row(name: str, probabilities: torch.Tensor, classes: Sequence[str], top: int) -> list[str]:
    """One line of the CSV file."""
    values, indices = probabilities.topk(min(top, len(classes)))
    best = [cell for v, i in zip(values.tolist(), indices.tolist()) for cell in (classes[i], f"{v:.6f}")]
    return [str(name), *best, *(f"{p:.6f}" for p in probabilities.tolist())]


def record(name: str, probabilities: torch.Tensor, classes: Sequence[str], top: int) -> dict[str, Any]:
    """One line of the JSONL file."""
    values, indices = probabilities.topk(min(top, len(classes)))
    best = [{"class": classes[i], "probability": round(v, 6)} for v, i in zip(values.tolist(), indices.tolist())]
    every = {c: round(p, 6) for c, p in zip(classes, probabilities.tolist())}
    return {"path": str(name), **best[0], "top": best, "probabilities": every}
