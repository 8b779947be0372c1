"""Metrics of a task between the trainer's loops, some of which run in inference mode and some do not."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

M = TypeVar("M", bound=Metric | MetricCollection)


class Metrics(nn.ModuleDict, Generic[M]):
    """Metrics of one kind by name."""

    def __getitem__(self, key: str) -> M:
        return super().__getitem__(key)  # type: ignore[return-value]  # nothing else is put in


class FreshMetrics(Callback):
    """Before a loop that is no inference: new states for metrics whose states an inference has left.

    `Trainer.validate` and `test` run in inference mode, and the validation of `fit` does not: a tensor of the former
    cannot be added to in the latter.
    """

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not torch.is_inference_mode_enabled():
            renew(pl_module)

    on_train_start = on_validation_start = _begin
    on_test_start = on_predict_start = _begin


def renew(module: nn.Module) -> None:
    """Reset every metric under a module that has states of inference mode."""
    for found in module.modules():
        if isinstance(found, MetricCollection) and any(map(_inferred, found.values(copy_state=False))):
            found.reset()
    for found in module.modules():
        if isinstance(found, Metric) and _inferred(found):
            found.reset()


def _inferred(metric: Metric) -> bool:
    states = [getattr(metric, name) for name in metric._defaults]
    return any(isinstance(state, Tensor) and state.is_inference() for state in states)
