"""Predictions as files in the run's folder: lines of a table, or a file for each input."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmpeft.errors import ConfigError, shown
from mmpeft.files import explained, free_path, write_atomic
from mmpeft.tasks.publish import run_folder
from mmpeft.types import Batch, Facts, Json, Output

SUFFIXES = (".csv", ".jsonl")
SHOWN = 10
"""Lines that are printed where a user gave the inputs."""
Line = Facts
_RUNNER_UP = re.compile(r"^p\(|_\d+$")


class PredictionFile(Callback):
    """Streams what `predict_step` returns to a CSV or JSONL file, by what the task says the lines are.

    Lines go to a temporary file, renamed when all is predicted: the file is whole or absent. With several processes,
    those of rank 0 come first. A CSV's columns are the keys of its first line.
    """

    def __init__(self, path: str, lines: Callable[[Output, str], Iterable[Line]]) -> None:
        """
        Args:
            path: of the file, in the run's folder unless absolute.
            lines: the lines for one output of `predict_step`, and the suffix of the file they are for.

        Raises:
            ConfigError: the suffix is neither .csv nor .jsonl.
        """
        super().__init__()
        if Path(path).suffix not in SUFFIXES:
            raise ConfigError(f"predictions are written as {' or '.join(SUFFIXES)}, got {path!r}")
        self.path, self.lines = path, lines
        self._target = Path(path)
        self._file: TextIO | None = None
        self._begun = False

    def _part(self, rank: int) -> Path:
        return self._target.with_name(f".{self._target.name}.{rank}.tmp")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._target = target_of(trainer, pl_module, self.path, SUFFIXES)
        self._shown: list[Line] = []
        with explained(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part(trainer.global_rank).open(
                "w", newline="", encoding="utf-8", errors="backslashreplace"
            )
        self._begun = not trainer.is_global_zero  # the head of the table is rank 0's

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        loader: int = 0,
    ) -> None:
        suffix = self._target.suffix
        with explained(self._target):
            for line in self.lines(outputs, suffix):
                if len(self._shown) < SHOWN:
                    self._shown.append(line)
                self._write(json.dumps(line, ensure_ascii=False) + "\n" if suffix == ".jsonl" else self._row(line))

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text)

    def _row(self, line: Line) -> str:
        out = io.StringIO()
        table = csv.writer(out)
        if not self._begun:
            table.writerow(line)
            self._begun = True
        table.writerow(line.values())
        return out.getvalue()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._file is not None
        with explained(self._target):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        first, *others = (self._part(rank) for rank in range(trainer.world_size))
        with explained(self._target):
            with first.open("ab") as file:
                for part in others:
                    file.write(part.read_bytes())
                    part.unlink()
            os.replace(first, self._target)
        if getattr(pl_module, "output", None) is not None:
            Console().print(table_of(self._shown))
        Console().print(f"{self._target.stem}: {self._target}", soft_wrap=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
            self._part(trainer.global_rank).unlink(missing_ok=True)


class PredictionFolder(Callback):
    """Writes what `predict_step` returns as files, by what the task says they hold."""

    def __init__(
        self, name: str, files: Callable[[Output], Iterable[tuple[str, bytes]]], note: Callable[[], str]
    ) -> None:
        """
        Args:
            name: of the folder, in the run's folder.
            files: name and content of each file for one output of `predict_step`.
            note: what is said with the folder's path once all is predicted.
        """
        super().__init__()
        self.name, self.files, self.note = name, files, note
        self._folder = Path(name)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = target_of(trainer, pl_module, self.name)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        loader: int = 0,
    ) -> None:
        for name, content in self.files(outputs):
            write_atomic(self._folder / name, content)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Console().print(f"{self.name}: {self._folder} {self.note()}".rstrip(), soft_wrap=True)


def target_of(trainer: Trainer, module: LightningModule, name: str, suffixes: Sequence[str] = ()) -> Path:
    """Where predictions go: where the task was told, or in the run's folder. All processes must ask.

    What a user named is a file if it has one of the suffixes, else a folder. In the run's folder nothing is written
    over: a second `predictions.csv` is `predictions_2.csv`.
    """
    told: Path | None = getattr(module, "output", None)
    if told is not None:
        return told / name if suffixes and told.suffix not in suffixes else told
    path = run_folder(trainer) / name
    return Path(trainer.strategy.broadcast(free_path(path) if trainer.is_global_zero else path))


def table_of(lines: Sequence[Line]) -> Table:
    """The first lines of a file for a terminal: without columns of single probabilities."""
    first = lines[0] if lines else {}
    columns = [name for name, value in first.items() if not (_RUNNER_UP.search(name) or isinstance(value, list | dict))]
    table = Table(*map(escape, columns))
    for line in lines:
        table.add_row(*(escape(shown(str(line.get(name, "")))) for name in columns))
    return table


def class_file(path: str, classes: Callable[[], Sequence[str]]) -> PredictionFile:
    """The file of a task whose `predict_step` gives class probabilities; its classes are asked for as it is written."""
    return PredictionFile(path, lambda outputs, suffix: class_lines(outputs, classes(), suffix))


def class_lines(outputs: Facts, classes: Sequence[str], suffix: str, top: int = 5) -> Iterable[Line]:
    """Lines of class probabilities: the class, its probability, the runners-up, and the probabilities of all.

    Args:
        outputs: `{"id": [...], "probabilities": [B, C]}`.
        classes: C names.
        suffix: of the file; a table has a column for each number.
        top: how many classes are ranked.
    """
    for name, row in zip(outputs["id"], outputs["probabilities"]):
        yield _columns(name, row, classes, top) if suffix == ".csv" else _record(name, row, classes, top)


def _columns(name: str, probabilities: torch.Tensor, classes: Sequence[str], top: int) -> dict[str, str]:
    values, indices = probabilities.topk(min(top, len(classes)))
    line = {"path": str(name)}
    for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist()), 1):
        place = f"_{rank}" if rank > 1 else ""
        line |= {f"class{place}": classes[index], f"probability{place}": f"{value:.6f}"}
    return line | {f"p({label})": f"{p:.6f}" for label, p in zip(classes, probabilities.tolist())}


def _record(name: str, probabilities: torch.Tensor, classes: Sequence[str], top: int) -> Json:
    values, indices = probabilities.topk(min(top, len(classes)))
    best = [{"class": classes[i], "probability": round(v, 6)} for v, i in zip(values.tolist(), indices.tolist())]
    every = {c: round(p, 6) for c, p in zip(classes, probabilities.tolist())}
    return {"path": str(name), **best[0], "top": best, "probabilities": every}
