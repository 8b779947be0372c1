"""Running statistics of normalisations: still where the base is frozen, a part's own where a tuning moves them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmpeft.errors import Refused
from mmpeft.parts.base import CHILD, Hook, Part, Placement

if TYPE_CHECKING:
    from mmpeft.host import Plan

NAMES = ("running_mean", "running_var", "num_batches_tracked")
"""What PyTorch and all who follow it call the buffers that follow the data."""

MODE = "training"
"""Among the attributes that a host answers for: its forward pass keeps its statistics still (`Still`)."""


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a module's own forward pass moves in training mode; empty for one that keeps none.

    Batch and instance norms of every kind that track statistics, and what keeps such buffers beside weights that could
    train. A norm whose weight is itself a buffer is frozen by its library.
    """
    own = {name: module._buffers.get(name) for name in NAMES}
    found = {name: tensor for name, tensor in own.items() if tensor is not None}
    tracked = {"running_mean", "running_var"} & set(found)
    return found if tracked and (isinstance(module, _NormBase) or "weight" not in module._buffers) else {}


def frozen_statistics(model: nn.Module) -> list[str]:
    """Paths of all modules of the backbone with statistics, which stay still while the model is tuned."""
    return [path for path, module in own_modules(model) if running_statistics(module)]


def own_modules(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without the parts of tunings and what holds them."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != CHILD:
            yield from own_modules(child, f"{path}.{name}" if path else name, seen)


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


_inside = threading.local()
"""Which host runs at present in this thread as if in evaluation mode."""


class Still:
    """Mixin in front of a normalisation's class: statistics that no tuning moves stay, in training mode too.

    `training` is what was set, for whoever asks; the module's own forward pass alone sees False.
    """

    _plan: Plan

    @property
    def training(self) -> bool:
        return bool(self.__dict__[MODE]) and getattr(_inside, "host", None) is not self

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__[MODE] = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.__dict__[MODE] or self._moves():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        before, _inside.host = getattr(_inside, "host", None), self
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _inside.host = before

    def reset_running_stats(self) -> None:
        """The library's own, on the statistics of the tuning in use.

        Raises:
            Refused: none moves them; the base's stay as they are (`torch.optim.swa_utils.update_bn` asks for this).
        """
        if not self._moves():
            raise Refused(
                f"the running statistics of this {type(self).base.__name__} are the frozen base's; attach "  # type: ignore[attr-defined]
                "mmpeft.BatchStatistics() beside the method to have a tuning with its own"
            )
        super().reset_running_stats()  # type: ignore[misc]

    def _moves(self) -> bool:
        """Whether a part answers for the statistics under the present route."""
        return any(name in self._plan.reads for name in NAMES)


def _repeated() -> bool:
    """Whether this forward pass runs inside a backward pass: recomputation, which moved the statistics once already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
