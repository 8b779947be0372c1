"""The WiSE-FT curve: base and new accuracy on the way from the frozen pair to the tuned one."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import track

from mmpeft.combine.interpolate import interpolate
from mmpeft.errors import ConfigError, Refused
from mmpeft.files import png_of, write_atomic
from mmpeft.tasks.publish import run_folder
from mmpeft.types import AnyModule
from mmpeft.vla.fewshot.heads import Head
from mmpeft.vla.fewshot.task import FewShot

STAGES = ("val", "test")


class WiseCurve(Callback):
    """After the test, scores at `θ₀ + α (θ₁ − θ₀)` for every α, into `wise.csv` and `wise.png` of the run's folder.

    No second checkpoint is written. The α marked in the plot is the best one on the validation images, as test images
    choose nothing.
    """

    def __init__(self, shares: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)) -> None:
        if not shares:
            raise ConfigError("WiseCurve needs at least one share between the frozen pair (0) and the tuned one (1)")
        self.shares = list(shares)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, FewShot) or type(pl_module.head) is not Head:
            what = type(getattr(pl_module, "head", pl_module)).__name__
            raise Refused(
                f"a WiSE-FT curve goes from the frozen pair to the tuned one; with {what} there is more between them. "
                "It is for FewShot with the head Head; in Python mmpeft.interpolate scales any mergeable tuning"
            )
        method = pl_module.method
        if not method.mergeable:
            raise Refused(f"{method} adds no change of weights that could be scaled; WiSE-FT wants a mergeable method")

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task: AnyModule = pl_module
        rows = []
        for share in track(self.shares, "WiSE-FT", transient=True):
            with interpolate(task.tuning, share):
                rows.append({"alpha": share, **{k: v for s in STAGES for k, v in self._scores(task, s).items()}})
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        write_atomic(folder / "wise.csv", text.getvalue().encode())
        write_atomic(folder / "wise.png", plot(rows))
        Console().print(f"WiSE-FT: {folder / 'wise.csv'}, {folder / 'wise.png'}", soft_wrap=True)

    @staticmethod
    def _scores(task: FewShot, stage: str) -> dict[str, float]:
        data = task.datamodule
        loader = data.val_dataloader() if stage == "val" else data.test_dataloader()
        for batch in loader:
            task.evaluate(move_data_to_device(batch, task.device), stage)
        return {f"{stage}/{key}": float(value) for key, value in task.results(stage).items()}


def plot(rows: Sequence[dict[str, float]]) -> bytes:
    """Test accuracy of new classes against that of base ones along α, and the α that validation images choose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="base classes, test", ylabel="new classes, test", title="WiSE-FT: from frozen to tuned")
    axes.grid(alpha=0.3)
    key = "harmonic" if "test/harmonic" in rows[0] else "base"
    other = "test/new" if key == "harmonic" else "test/base"
    axes.plot([r["test/base"] for r in rows], [r[other] for r in rows], "o-", markersize=4)
    places: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        places.setdefault((row["test/base"], row[other]), []).append(f"{row['alpha']:g}")
    for place, shares in places.items():
        named = shares[0] if len(shares) == 1 else f"{shares[0]} – {shares[-1]}"
        axes.annotate(named, place, xytext=(4, 4), textcoords="offset points")
    best = max(rows, key=lambda row: row[f"val/{key}"])
    axes.plot(
        best["test/base"], best[other], "s", color="tab:red", label=f"α = {best['alpha']:g}, chosen on validation"
    )
    axes.legend()
    return png_of(figure)
