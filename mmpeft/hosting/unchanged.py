"""Whether tensors are what they were, so that what was computed from them may be used again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

T = TypeVar("T")

ENTRIES = 16
"""Looked at in each tensor of a whole model."""


class _Noted(NamedTuple):
    """What was seen of a tensor."""

    tensor: ReferenceType[Tensor]
    place: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    version: int
    entries: memoryview | None
    values: memoryview | None


class Unchanged:
    """Tells whether given tensors are those that were last noted, with the same values.

    They must be the same objects at the same place in memory, in the same shape, strides and type, with the same
    count of changes in place. Writes through `.data`, which no count sees, are found by looking at entries spread over
    each tensor: one in each row, or at most `entries` of them.

    It does not see a write through `.data` (or through NumPy, or by another process into shared memory) that spares
    every entry looked at, nor one that leaves their values as they were. On an accelerator, for which a look at values
    would have to wait, it sees none of these. Tensors without plain memory (fake, functorch's, distributed) count as
    changed.
    """

    def __init__(self, entries: int | None = None) -> None:
        self.entries = entries
        self._noted: tuple[_Noted, ...] | None = None

    def note(self, tensors: Sequence[Tensor]) -> bool:
        """Remember tensors as they are now; False where that is not possible."""
        found = [_note(tensor, self.entries) for tensor in tensors] if _plain_run() else [None]
        self._noted = tuple(noted for noted in found if noted is not None) if None not in found else None
        return self._noted is not None

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are those noted, unchanged."""
        noted = self._noted
        if noted is None or len(noted) != len(tensors):
            return False
        for tensor, (known, place, shape, stride, dtype, version, entries, values) in zip(tensors, noted):
            if (
                known() is not tensor
                or tensor.data_ptr() != place
                or (version >= 0 and tensor._version != version)
                or tensor.shape != shape
                or tensor.dtype is not dtype
                or tensor.stride() != stride
                or entries != values  # the memory is there: it is at its place
            ):
                return False
        return True

    def __deepcopy__(self, memo: object) -> Unchanged:
        return type(self)(self.entries)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.entries,)


class Kept(Generic[T]):
    """A value computed from tensors, computed again once one of them has changed; copies and pickles hold none."""

    def __init__(self, entries: int | None = None) -> None:
        self.entries = entries
        self._last: tuple[Unchanged, T] | None = None  # replaced as a whole: threads may share it

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """The value for these tensors."""
        last = self._last
        if last is not None and last[0].holds(tensors):
            return last[1]
        unchanged = Unchanged(self.entries)
        noted = unchanged.note(tensors)  # before computing: a change meanwhile is seen
        value = compute()
        self._last = (unchanged, value) if noted else None
        return value

    def __deepcopy__(self, memo: object) -> Kept[T]:
        return type(self)(self.entries)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.entries,)


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
        tensors = [value for _, _, value in self._places if isinstance(value, Tensor)]
        self.tensors = [plain for tensor in tensors for plain in made_of(tensor)]
        self._unchanged = Unchanged(ENTRIES)

    def note(self) -> bool:
        """Remember the tensors as they are now; False where that is not possible."""
        return bool(self.tensors) and self._unchanged.note(self.tensors)

    def same(self) -> bool:
        """Whether the module holds the same tensors and modules as when it was first seen, unchanged since noted."""
        if any(table.get(name) is not value for table, name, value in self._places):
            return False
        return self._unchanged.holds(self.tensors)

    def training(self) -> bool:
        """Whether any of its modules that compute something is in training mode."""
        return any(module.training for module in self._computing)


def made_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a subclass is made of; the tensor itself where it is none, or none that says so."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from made_of(getattr(tensor, name))
    else:
        yield tensor


def _plain_run() -> bool:
    """Whether tensors are what they seem: no tracing, no transform, no mode that stands in for them."""
    return not (torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None) and (
        _get_current_dispatch_mode() is None
    )


def _note(tensor: Tensor, most: int | None) -> _Noted | None:
    known = ref(tensor)
    bare = tensor if type(tensor) in (Tensor, nn.Parameter) else _bare(tensor)
    if bare is None or bare.is_meta or bare.layout is not torch.strided:
        return None
    version = -1 if bare.is_inference() else bare._version
    entries = _entries(bare, most) if bare.device.type == "cpu" else None
    values = None if entries is None else _as(memoryview(entries.tobytes()), entries.format)
    return _Noted(known, bare.data_ptr(), bare.shape, bare.stride(), bare.dtype, version, entries, values)


_UNITS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _entries(tensor: Tensor, most: int | None) -> memoryview | None:
    """Entries spread over a tensor's memory: a window, read only while the tensor is known to be there."""
    size, unit = tensor.numel(), tensor.element_size()
    if not size:
        return None
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    row = max(1, size // tensor.shape[0]) if tensor.dim() else 1
    step = row if most is None else max(1, extent // most)
    if step > 1 and step % row == 0:
        step -= 1  # an entry in each row, and another column from row to row
    window = (ctypes.c_char * (extent * unit)).from_address(tensor.data_ptr())
    return _as(memoryview(window).cast("B"), _UNITS.get(unit, "B"))[::step]


def _as(memory: memoryview[int], unit: str) -> memoryview[int]:
    """Bytes as integers: comparing these is several times as fast as comparing numbers or bytes."""
    found: memoryview[int] = memory.cast(unit)  # type: ignore[call-overload]  # the unit is a known letter
    return found


def _bare(tensor: Tensor) -> Tensor | None:
    """The plain tensor behind a subclass that only adds attributes; None for one that computes."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return tensor.as_subclass(Tensor)
