"""What a training step keeps in memory, counted rather than sampled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmpeft.types import Args, Batch, Kwargs, TorchOp


class _Live(TorchDispatchMode):
    """Storages made under this mode and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: TorchOp, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return out


def kept_for_backward(loss: Callable[[], Tensor]) -> int:
    """Bytes alive between the forward and the backward pass of `loss()`, parameters and inputs excluded.

    Counts every storage that autograd, an autograd function or a checkpoint holds on to, each once.
    """
    live = _Live()
    with live:
        value = loss()
    kept = sum(live.sizes.values())
    del value
    return kept


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step."""

    weights: int
    trainable: int
    kept: int

    @property
    def total(self) -> int:
        """Weights, gradients and two AdamW moments of what trains, and what is kept for the backward pass."""
        return self.weights + 3 * self.trainable + self.kept


class MemoryMeter(Callback):
    """Counts the memory of a run's first training step: what is alive when the backward pass begins."""

    def __init__(self) -> None:
        self.found: StepMemory | None = None
        self._live: _Live | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self.found is None:
            self._live = _Live()
            self._live.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
            trainable = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
            self.found, self._live = StepMemory(weights, trainable, sum(self._live.sizes.values())), None
