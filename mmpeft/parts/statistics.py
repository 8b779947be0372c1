"""`Statistics`: running statistics of a normalisation that a tuning moves, beside the base's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpeft.hosting.still import running_statistics
from mmpeft.parts.base import Hook, Part, Placement


class Statistics(Part):
    """`μ ← (1 − m) μ + m mean(x)` and so for the variance, beside the base's own, which stay as they are.

    Holds no parameter: in training mode the host normalises by the batch and moves these buffers, in evaluation mode it
    normalises by them. A pass that recomputation repeats moves nothing. Batch normalisation, arXiv:1502.03167.
    """

    order = 4
    scalable = True
    rowwise = False

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in base.items():
            self.register_buffer(name, tensor.detach().clone())

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        own = self._buffers[name]
        assert own is not None
        return own.clone() if _repeated() else own

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        own = self._buffers[hook.name]
        assert own is not None
        params[hook.name] = own.clone()

    def frozen(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}


def place(model: nn.Module, path: str) -> Placement:
    """A part that takes the place of the statistics of the module at a path."""
    own = running_statistics(model.get_submodule(path))
    hooks = tuple(Hook(path, "read", name) for name in own)
    return Placement(Statistics(own), path, "statistics", hooks, "norm")


def _repeated() -> bool:
    """Whether this forward pass runs inside a backward pass: recomputation, which moved the statistics once already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
