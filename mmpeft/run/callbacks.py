"""What a run leaves behind: learning curves, the adapter, and a table that sums it up."""

from __future__ import annotations

import csv
import io
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from rich.table import Table

from mmpeft.files import png_of, write_atomic
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Union
from mmpeft.methods.selective.plan import Plan
from mmpeft.tasks.module import TuningModule
from mmpeft.tasks.publish import folder_of
from mmpeft.types import StateDict


class LearningCurves(Callback):
    """Writes `curves.csv` after every epoch and draws `curves.png` when training ends; resumed runs go on in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)
        if folder and trainer.global_step:
            self.rows = rows_before(folder / "curves.csv", trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if groups:  # none where nothing trains
            found["lr"] = float(groups[0]["lr"])
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **found})
        if folder := folder_of(trainer):
            write_atomic(folder / "curves.csv", to_csv(self.rows).encode())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)
        if folder and self.rows:
            picture = draw(self.rows)
            if picture:
                write_atomic(folder / "curves.png", picture)


def rows_before(path: Path, step: int) -> list[dict[str, float]]:
    """What a table of an interrupted run holds up to a step; nothing where there is no table."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("step", 0) <= step]


def to_csv(rows: list[dict[str, float]]) -> str:
    """All rows under the union of their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    table = csv.DictWriter(out, columns, restval="")
    table.writeheader()
    table.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    return out.getvalue()


def draw(rows: list[dict[str, float]]) -> bytes:
    """A PNG with one panel for each metric, training and validation together; empty without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return b""
    series = [key for key in dict.fromkeys(key for row in rows for key in row) if "/" in key]
    series = [key for key in series if not key.endswith("_step")]
    panels: dict[str, list[str]] = {}
    for key in series:
        panels.setdefault(key.partition("/")[2].removesuffix("_epoch"), []).append(key)
    kinds = list(dict.fromkeys(key.partition("/")[0] for key in series))  # of one colour in every panel
    figure = Figure(figsize=(4 * max(1, len(panels)), 3), layout="constrained")
    for number, (metric, keys) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for key in keys:  # `train/loss` and `train/loss_epoch` are of one colour, and told apart
            points = [(row["step"], row[key]) for row in rows if key in row]
            kind = key.partition("/")[0]
            alone = sum(key.partition("/")[0] == kind for key in keys) == 1
            label = kind if alone else key
            style = "-" if key == next(other for other in keys if other.startswith(f"{kind}/")) else "--"
            axes.plot(*zip(*points), style, marker=".", label=label, color=f"C{kinds.index(kind) % 10}")
        axes.set(title=metric, xlabel="step")
        axes.legend()
    return png_of(figure, dpi=120)


class Outcome(Callback):
    """When training ends: writes the adapter to `adapter/` and prints what was trained, what it cost and gave."""

    def __init__(self) -> None:
        super().__init__()
        self._start, self._before = 0.0, 0.0
        self._adapter: Path | None = None

    def state_dict(self) -> StateDict:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: StateDict) -> None:
        self._before = float(state_dict["seconds"])

    @property
    def seconds(self) -> float:
        """Training time, that of resumed parts included."""
        return self._before + (time.monotonic() - self._start if self._start else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)
        if folder and isinstance(pl_module, TuningModule):
            tuning = pl_module.prepare()
            tuning.controllers.fit_end()
            self._adapter = tuning.save(folder / "adapter", inference=True)
            for plan in plans(tuning.method):
                plan.save(folder / "plan.json")
                if find_spec("matplotlib"):
                    plan.draw(folder / "plan.png")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, TuningModule):
            return
        tuning = pl_module.prepare()
        report = tuning.report()
        rows = {
            "method": f"{pl_module.method}",
            "model": type(tuning.model).__name__.removeprefix("Tuned"),
            "trainable": f"{report.trainable:,} of {report.total:,} ({report.share:.3%})",
            "epochs, steps": f"{trainer.current_epoch}, {trainer.global_step}",
            "seconds": f"{self.seconds:.1f}",
            "peak memory": f"{peak_memory() / 2**20:,.0f} MiB ({'GPU' if torch.cuda.is_available() else 'process'})",
        }
        beside = sum(p.numel() for p in pl_module.parameters() if p.requires_grad) - report.trainable
        if beside:
            rows["trains beside"] = f"{beside:,} (heads, other models of the task)"
        for key, value in sorted(trainer.callback_metrics.items()):
            if value.numel() == 1 and not key.endswith("_step"):
                rows[key] = f"{float(value):.4f}"
        for best in trainer.checkpoint_callbacks:
            if isinstance(best, ModelCheckpoint) and best.monitor and best.best_model_score is not None:
                rows["best"] = f"{best.monitor} {float(best.best_model_score):.4f}: {best.best_model_path}"
        if self._adapter:
            rows |= {"adapter": str(self._adapter), "run": str(self._adapter.parent)}
        table = Table(title="Outcome", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, text)
        Console().print(table)
        if self._adapter:
            run = self._adapter.parent
            Console().print(f"next: mmpeft test {run}   or predict, resume, export: `mmpeft --help`", soft_wrap=True)


def plans(method: Method) -> list[Plan]:
    """The plans in a method."""
    if isinstance(method, Union):
        return [plan for member in method.methods for plan in plans(member)]
    return [method] if isinstance(method, Plan) else []


def peak_memory() -> int:
    """Peak bytes: of this process's GPU, or resident in memory where there is none (0 if the system does not tell)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
