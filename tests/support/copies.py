"""What is dear to build is built once a process; every test gets a copy of its own, which it may spoil."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Copies(Generic[T]):
    """A builder that builds at its first call; this and every later call answers with a fresh copy.

    A pickle holds everything but the tensors, which are cloned: PyTorch's own pickling of storages takes several
    times as long. A tensor that stands in several places (a tied weight) is one tensor in a copy too.
    """

    def __init__(self, build: Callable[[], T]) -> None:
        self.build = build
        self.skeleton: bytes | None = None
        self.tensors: list[Tensor] = []

    def __call__(self) -> T:
        if self.skeleton is None:
            buffer = io.BytesIO()
            _Pickler(buffer, self.tensors).dump(self.build())
            self.skeleton = buffer.getvalue()
        copy: T = _Unpickler(io.BytesIO(self.skeleton), self.tensors).load()
        return copy


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors = tensors
        self.places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) not in (Tensor, nn.Parameter) or vars(obj) or obj.layout != torch.strided:
            return None
        if id(obj) not in self.places:
            self.places[id(obj)] = len(self.tensors)
            self.tensors.append(_twin(obj))
        return self.places[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self.made: dict[int, Tensor] = {}

    def persistent_load(self, place: int) -> Tensor:
        if place not in self.made:
            self.made[place] = _twin(self.tensors[place])
        return self.made[place]


def _twin(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


def copies(builders: dict[str, Callable[[], T]]) -> dict[str, Callable[[], T]]:
    """Each builder of a table, built once."""
    return {name: Copies(build) for name, build in builders.items()}
