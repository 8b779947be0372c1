"""Running statistics of a frozen base stay still, in training mode too, unless a tuning has its own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmpeft.errors import Refused
from mmpeft.hosting.forward import plan_of
from mmpeft.hosting.modules import own_modules
from mmpeft.types import AnyModule, Argument, Output

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


_inside = threading.local()
"""Which host runs at present in this thread as if in evaluation mode."""


if TYPE_CHECKING:
    Norm = _NormBase  # what it is mixed into
else:
    Norm = object


class Still(Norm):
    """Mixin in front of a normalisation's class: statistics that no tuning moves stay, in training mode too.

    `training` is what was set, for whoever asks; the module's own forward pass alone sees False.
    """

    @property
    def training(self) -> bool:
        return bool(self.__dict__[MODE]) and getattr(_inside, "host", None) is not self

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__[MODE] = mode

    def forward(self, *args: Argument, **kwargs: Argument) -> Output:
        if not self.__dict__[MODE] or self._moves():
            return super().forward(*args, **kwargs)
        before, _inside.host = getattr(_inside, "host", None), self
        try:
            return super().forward(*args, **kwargs)
        finally:
            _inside.host = before

    def reset_running_stats(self) -> None:
        """The library's own, on the statistics of the tuning in use.

        Raises:
            Refused: none moves them; the base's stay as they are (`torch.optim.swa_utils.update_bn` asks for this).
        """
        if not self._moves():
            host: AnyModule = type(self)
            raise Refused(
                f"the running statistics of this {host.mmpeft_base.__name__} are the frozen base's; attach "
                "mmpeft.BatchStatistics() beside the method to have a tuning with its own"
            )
        super().reset_running_stats()

    def _moves(self) -> bool:
        """Whether a part answers for the statistics under the present route."""
        return any(name in plan_of(self).reads for name in NAMES)
