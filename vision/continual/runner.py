"""`ContinualClassifier`: trains a learner on a sequence of tasks and measures it after each one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from mmpeft.bank import Bank
from mmpeft.data.images import ImageData
from mmpeft.data.sampling import hash_seed
from mmpeft.errors import AdapterFileError, ConfigError, DataError
from mmpeft.files import write_atomic
from mmpeft.run.experiment import Experiment
from mmpeft.tasks.module import OnDevice
from mmpeft.tasks.schedule import warmup_cosine
from mmpeft.types import Argument, Kwargs, Untyped
from mmpeft.vision.backbone import create, normalisation
from mmpeft.vision.continual.data import SequenceTask, TaskSequence
from mmpeft.vision.continual.learner import Learner

Tell = Callable[[str], None]


@dataclass
class SequenceRecord:
    """What a run has measured so far: rows of R, test samples of each task, most parameters trained at once."""

    key: str = ""
    name: str = ""
    seed: int = 0
    matrix: list[list[float]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    trained: int = 0
    kept: int = 0
    seconds: float = 0.0
    classes: list[str] = field(default_factory=list)

    def square(self) -> list[list[float]]:
        """R with NaN above the diagonal."""
        return [row + [float("nan")] * (len(self.matrix) - len(row)) for row in self.matrix]


class ContinualClassifier:
    """One backbone, one learner, one sequence of tasks.

    Everything random follows from `seed`; task t is the same whether the run was interrupted before it or not.
    """

    def __init__(
        self,
        learner: Learner,
        data: ImageData,
        backbone: str,
        initial: int,
        increment: int,
        order: int | None = None,
        seed: int = 0,
        epochs: int = 5,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        pretrained: bool = True,
        model_args: Kwargs | None = None,
        trainer: Kwargs | None = None,
    ) -> None:
        """
        Args:
            learner: the method.
            data: the images.
            backbone: a timm name, a local folder, or `embedded:<name>`.
            initial: classes of the first task.
            increment: classes of each further task.
            order: seed of the order in which classes arrive (1993 in the literature); None for the order of the data.
            seed: of initialisation, batches and augmentation.
            epochs: of each task that trains.
            lr: of AdamW.
            weight_decay: of matrices; vectors have none.
            warmup: share of a task's steps with a linear rise of the learning rate; cosine decay to zero follows.
            pretrained: whether to load the backbone's weights.
            model_args: further arguments for the backbone.
            trainer: arguments of lightning.Trainer, such as `precision` or `devices`.
        """
        if epochs < 1 or lr <= 0:
            raise ConfigError(f"epochs must be at least 1 and lr positive, got {epochs} and {lr}")
        lightning.seed_everything(seed, verbose=False)
        self.learner, self.data, self.seed, self.epochs = learner, data, seed, epochs
        self.lr, self.weight_decay, self.warmup, self.trainer = lr, weight_decay, warmup, dict(trainer or {})
        self.model = create(backbone, num_classes=0, pretrained=pretrained, **(model_args or {}))
        data.configure(normalisation(self.model))
        self.sequence = TaskSequence(data, initial, increment, order)

    def run(
        self, folder: Path | None = None, key: str = "", name: str = "", tell: Tell | None = None
    ) -> SequenceRecord:
        """Train and test task by task; with a folder, go on after the last finished task of the same `key`."""
        bank, record = self._resumed(folder, key) if folder else (Bank(self.model), SequenceRecord())
        record.key, record.name, record.seed, record.classes = key, name, self.seed, self.sequence.classes
        width: Untyped = self.model.num_features
        self.learner.bind(bank, int(width))
        for task in self.sequence.tasks[len(record.matrix) :]:
            start = time.monotonic()
            if tell:
                tell(f"task {task.number + 1} of {task.total}")
            lightning.seed_everything(hash_seed(self.seed, task.number) % 2**32, verbose=False)
            self._learn(task, record)
            record.matrix.append(self._measured(task))
            record.counts = [len(self.sequence.rows("test", t.classes)) for t in self.sequence.tasks[: task.number + 1]]
            record.kept = sum(p.numel() for n in bank.ids for p in bank.parameters_of(n))
            record.seconds += time.monotonic() - start
            if folder:
                bank.save(folder / "bank")
                manifest = hashlib.sha256((folder / "bank" / "bank.json").read_bytes()).hexdigest()
                write_atomic(folder / "record.json", json.dumps(asdict(record) | {"bank": manifest}).encode())
        return record

    def _resumed(self, folder: Path, key: str) -> tuple[Bank, SequenceRecord]:
        """Bank and record after the last finished task; both new if there are none that belong together."""
        path = folder / "record.json"
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            manifest = folder / "bank" / "bank.json"
            whole = manifest.is_file() and hashlib.sha256(manifest.read_bytes()).hexdigest() == found.pop("bank")
            if whole and found["key"] == key:
                try:
                    return Bank.load(self.model, folder / "bank"), SequenceRecord(**found)
                except AdapterFileError as error:
                    raise AdapterFileError(f"cannot resume: {error}; remove {folder} to start again") from error
        return Bank(self.model), SequenceRecord()

    def _learn(self, task: SequenceTask, record: SequenceRecord) -> None:
        learner, bank = self.learner, self.learner.bank
        classes = range(task.stop) if learner.revisits else task.classes
        device = next(self.model.parameters()).device
        plain = OnDevice(self.sequence.plain(task.classes), device)
        bank.eval()
        learner.begin(task, plain)
        for name in bank.ids:
            if bank[name].method is not None and bank.tuning(name).controllers:
                raise ConfigError(f"{bank[name].method} drives controllers, which a task sequence does not run")
        if learner.trains(task):
            record.trained = max(record.trained, sum(p.numel() for p in bank.trainable_parameters()))
            fit = _Fit(self, task)
            trainer = lightning.Trainer(max_epochs=self.epochs, **{**Experiment.quiet, **self.trainer})
            bank.train()
            trainer.fit(fit, self.sequence.training(classes))
            bank.to(device)
        bank.eval()
        learner.end(task, plain)

    @torch.no_grad()
    def _measured(self, task: SequenceTask) -> list[float]:
        """Accuracy on each task so far, among all classes so far."""
        device = next(self.model.parameters()).device
        row = []
        for past in self.sequence.tasks[: task.number + 1]:
            right, count = 0, 0
            for images, labels in OnDevice(self.sequence.testing(past.classes), device):
                scores = self.learner.scores(images)
                if scores.shape != (len(images), task.stop) or not torch.isfinite(scores).all():
                    raise DataError(
                        f"{type(self.learner).__name__} gave scores {tuple(scores.shape)} for {len(images)} images and "
                        f"{task.stop} classes, or values that are not finite"
                    )
                right += int((scores.argmax(1) == labels).sum())
                count += len(labels)
            row.append(right / count)
        return row


class _Fit(lightning.LightningModule):
    """One task under Lightning's Trainer."""

    def __init__(self, owner: ContinualClassifier, task: SequenceTask) -> None:
        super().__init__()
        self.bank, self.learner, self.owner, self.task = owner.learner.bank, owner.learner, owner, task

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self.learner.loss(*batch)
        if not torch.isfinite(loss):
            raise DataError(f"the loss of task {self.task.number} is {float(loss)}: lower the learning rate")
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_start(self) -> None:
        self.learner.epoch(self.current_epoch / self.owner.epochs)

    def on_train_batch_end(self, *args: Argument) -> None:
        self.learner.after_step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        tensors = self.bank.trainable_parameters()
        groups = [
            {"params": [p for p in tensors if p.dim() > 1], "weight_decay": self.owner.weight_decay},
            {"params": [p for p in tensors if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.owner.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = warmup_cosine(optimizer, steps, self.owner.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
