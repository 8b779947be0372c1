"""What a training step keeps in memory, counted rather than sampled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Storages made under this mode and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def step_memory(model: nn.Module, trainable: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> StepMemory:
    """Count the memory of a training step with AdamW."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return StepMemory(weights, sum(p.numel() * p.element_size() for p in trainable), kept_for_backward(loss))
