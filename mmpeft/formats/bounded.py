"""Memory that loading a file may take: in proportion to the file and to the model, whatever the file says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.errors import AdapterFileError, SiteError
from mmpeft.sites import sites
from mmpeft.types import Argument, Untyped

SPARE = 2**24
"""Elements that are always allowed: 64 MiB."""
TIMES = 4
"""Of what file and model hold together: copies, norms and masks that a method makes on the way."""
SIZED = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "eye", "linspace")
"""Operations of torch that make a tensor of a size that is given, alone and with `new_` before them."""


class Bounded(TorchDispatchMode):
    """Refuses to make tensors of more elements in all than a file and a model account for, before each is made.

    An adapter of a few bytes may say that its rank is a million; shapes can be compared once a tensor is there.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor], where: object) -> None:
        super().__init__()
        held = sum(t.numel() for t in tensors) + sum(p.numel() for p in model.parameters())
        self.left, self.where = TIMES * held + SPARE, where

    def __torch_dispatch__(
        self,
        func: Untyped,
        types: object,
        args: tuple[Argument, ...] = (),
        kwargs: Mapping[str, Argument] | None = None,
    ) -> Untyped:
        name = func.name().removeprefix("aten::").partition(".")[0].removeprefix("new_").removesuffix("_strided")
        if name in SIZED:
            wanted = _elements(name, args)
            if wanted > self.left:
                raise AdapterFileError(
                    f"{self.where} asks for a tensor of {wanted:,} elements, far more than it and the model hold; it "
                    "is damaged, or made to exhaust memory"
                )
            self.left -= wanted
        return func(*args, **(kwargs or {}))


@contextmanager
def bounded(model: nn.Module, tensors: Iterable[Tensor], where: object) -> Iterator[None]:
    """`Bounded`, once the sites of the model are known: watching it would be counted too."""
    with suppress(SiteError):
        sites(model)
    with Bounded(model, tensors, where):
        yield


def most_bytes(model: nn.Module) -> int:
    """Of a file of tensors that tune a model: all of it in a wide type, several times over."""
    return 2**26 + 16 * sum(t.numel() * max(t.element_size(), 4) for t in model.parameters())


def _elements(name: str, args: tuple[Argument, ...]) -> int:
    sizes = next((arg for arg in args if isinstance(arg, list | tuple | torch.Size)), None)
    if sizes is not None:
        return math.prod(max(int(size), 0) for size in sizes)
    numbers = [int(arg) for arg in args if isinstance(arg, int | float) and math.isfinite(arg)]
    if name == "eye":
        return math.prod(numbers[:2]) if len(numbers) > 1 else sum(numbers) ** 2
    return max(map(abs, numbers), default=0)
