"""Whether tensors are what they were, so that what was computed from them may be used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

ENTRIES = 16
"""Of each tensor, looked at for writes through `.data`, which no count of changes sees."""


class Unchanged:
    """Tells whether given tensors are those that were last noted, with the same values.

    They must be the same objects at the same place in memory, of the same type and with the same count of changes in
    place; `ENTRIES` values spread over each must be what they were. A write through `.data` that spares all of
    these is not seen.
    """

    def __init__(self) -> None:
        self._tensors: tuple[Tensor, ...] = ()
        self._marks: list[tuple[int, int, torch.dtype]] = []
        self._views: list[list[Tensor]] = []
        self._values: list[Tensor] = []

    def note(self, tensors: Sequence[Tensor]) -> bool:
        """Remember tensors as they are now; False where that is not possible."""
        self.__init__()  # type: ignore[misc]
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            plain = list(_plain(tensor))
            if not plain:
                return False
            for own in plain:
                groups.setdefault((own.device, own.dtype), []).append(_spread(own))
        self._tensors, self._marks = tuple(tensors), [_mark(t) for t in tensors]
        self._views = list(groups.values())
        self._values = [torch.cat(views) for views in self._views]
        return True

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are those noted, unchanged."""
        if len(tensors) != len(self._tensors) or not tensors:
            return False
        for tensor, known, mark in zip(tensors, self._tensors, self._marks):
            if tensor is not known or _mark(tensor) != mark:
                return False
        return all(torch.equal(torch.cat(views), values) for views, values in zip(self._views, self._values))


class Watched:
    """All tensors of a module, looked up where they are kept: found again without a walk over its modules."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._computing = [own for own in modules if not isinstance(own, nn.ModuleDict | nn.ModuleList)]
        self._places = [
            (table, name, value)
            for own in modules
            for table in (own._parameters, own._buffers, own._modules)
            for name, value in table.items()
        ]
        self.tensors = [value for _, _, value in self._places if isinstance(value, Tensor)]
        self._unchanged = Unchanged()

    def note(self) -> bool:
        """Remember the tensors as they are now; False where that is not possible."""
        with torch.inference_mode(False), torch.no_grad():
            return self._unchanged.note(self.tensors)

    def same(self) -> bool:
        """Whether the module holds the same tensors and modules as when it was first seen, unchanged since noted."""
        if any(table.get(name) is not value for table, name, value in self._places):
            return False
        with torch.no_grad():
            return self._unchanged.holds(self.tensors)

    def training(self) -> bool:
        """Whether any of its modules that compute something is in training mode."""
        return any(module.training for module in self._computing)


def _mark(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    version = -1 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr() if _strided(tensor) else 0), version, tensor.dtype


def _strided(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout is torch.strided


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own behind one; none where that cannot be known."""
    if _strided(tensor):
        if tensor.device.type != "meta":
            yield tensor.detach()
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))


def _spread(tensor: Tensor) -> Tensor:
    """A view of some entries of a tensor, from its first to about its last."""
    if not tensor.numel():
        return tensor.reshape(-1)
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    step = max(1, (extent - 1) // (ENTRIES - 1))
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_strided((1 + (extent - 1) // step,), (step,))
