"""Options that all tasks share: typed where a constructor passes them on, explained where the base takes them."""

from __future__ import annotations

from typing import TypedDict

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from mmpeft.hosting.recompute import Recompute


class SteppingOptions(TypedDict, total=False):
    """Options of `TuningModule`, which explains them, but for `warmup`."""

    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    recompute: Recompute
    compile: bool


class TrainingOptions(SteppingOptions, total=False):
    """Options of `TuningModule`."""

    warmup: float
