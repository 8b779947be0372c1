"""`examples.png` of a comparison: test pictures that the baseline gets wrong and a tuned model right."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from mmpeft.bench.report import Result
from mmpeft.data.pixels import pixels
from mmpeft.files import write_atomic
from mmpeft.run.experiment import Experiment
from mmpeft.tasks.pictures import picture_grid
from mmpeft.tasks.task import Task
from mmpeft.types import AnyModule, Batch, Output

SHOWN = 24


@dataclass(frozen=True)
class Answers:
    """Classes of a run's test samples, in the order of the test set: the true ones and those that the model named."""

    classes: list[str]
    labels: list[int]
    predicted: list[int]


class KeepAnswers(Callback):
    """Writes the `Answers` of a test to a file, where the task has them; a test on several processes has no order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.classes: list[str] = []
        self.labels: list[int] = []
        self.predicted: list[int] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None or not isinstance(pl_module, Task) or trainer.world_size > 1:
            return
        found = pl_module.classified(batch, outputs)
        if found is not None:
            module: AnyModule = pl_module
            self.classes = module.classes
            self.labels += found[0].tolist()
            self.predicted += found[1].tolist()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.predicted:
            answers = Answers([str(name) for name in self.classes], self.labels, self.predicted)
            write_atomic(self.file, json.dumps(answers.__dict__).encode())


def answers_file(out: Path, key: str) -> Path:
    """Where the answers of a run are kept."""
    return out / "answers" / f"{key}.json"


def examples(out: Path, experiment: Experiment, baseline: Result, best: Result) -> bytes | None:
    """A PNG of up to 24 test pictures that one run gets wrong and the other right, of all classes in turn.

    None where a run kept no answers, the test sets differ, there is no such picture, or the samples are no pictures.

    Args:
        out: folder of the comparison.
        experiment: the baseline's, for its test set.
        baseline: the run that is wrong.
        best: the run that is right.
    """
    files = [answers_file(out, run.key) for run in (baseline, best)]
    if not all(file.exists() for file in files):
        return None
    before, after = (Answers(**json.loads(file.read_text("utf-8"))) for file in files)
    if (before.classes, before.labels) != (after.classes, after.labels):
        return None
    gained, lost = _rows(before, after), _rows(after, before)
    data = experiment.data()
    data.setup("test")
    samples = getattr(data, "test_set", None)
    shown = in_turn(gained, before.labels)[:SHOWN]
    pictures = [_picture(samples[row][0]) for row in shown] if samples is not None else []
    if not pictures or any(picture is None for picture in pictures):
        return None
    names = before.classes
    return picture_grid(
        [picture for picture in pictures if picture is not None],
        [names[before.labels[row]] for row in shown],
        {
            "tab:red": [f"{baseline.method}: {names[before.predicted[row]]}" for row in shown],
            "tab:green": [f"{best.method}: {names[after.predicted[row]]}" for row in shown],
        },
        f"Test pictures that {baseline.method} gets wrong and {best.method} right: {len(gained)} of "
        f"{len(before.labels)}\n(the other way round: {len(lost)}; seed {best.seed})",
    )


def _rows(wrong: Answers, right: Answers) -> list[int]:
    """Samples that one run gets wrong and the other right."""
    both = zip(wrong.labels, wrong.predicted, right.predicted)
    return [row for row, (label, first, second) in enumerate(both) if first != label == second]


def in_turn(rows: list[int], labels: list[int]) -> list[int]:
    """Rows with one of each class first, then a second of each, and so on; classes in order of their numbers."""
    own: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        own[labels[row]].append(row)
    rounds = zip_longest(*(own[label] for label in sorted(own)))
    return [row for row in chain.from_iterable(rounds) if row is not None]


def _picture(sample: object) -> Tensor | None:
    """A sample's picture before any transform, uint8 [3, H, W]; None for what is no picture."""
    if isinstance(sample, Image.Image):
        return pixels(sample.convert("RGB"))
    return sample if isinstance(sample, Tensor) and sample.dtype == torch.uint8 and sample.dim() == 3 else None
