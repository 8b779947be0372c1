"""Memory that loading a file may take: in proportion to the file and to the model, whatever the file says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmpeft.errors import AdapterFileError, SiteError
from mmpeft.sites import sites
from mmpeft.types import Argument, Untyped

SPARE = 2**24
"""Elements that are always allowed: 64 MiB."""
TIMES = 4
"""Of what file and model hold together: copies, norms and masks that a method makes on the way."""
SIZED = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "eye", "linspace")
"""Functions of torch that make a tensor of a size that is given, alone and with `new_` before them."""


class Bounded(TorchFunctionMode):
    """Refuses to make tensors of more elements in all than a file and a model account for, before each is made.

    An adapter of a few bytes may say that its rank is a million; shapes can be compared once a tensor is there.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor], where: object) -> None:
        super().__init__()
        held = sum(t.numel() for t in tensors) + sum(p.numel() for p in model.parameters())
        self.left, self.where = TIMES * held + SPARE, where

    def __torch_function__(
        self,
        func: Untyped,
        types: object,
        args: tuple[Argument, ...] = (),
        kwargs: Mapping[str, Argument] | None = None,
    ) -> Untyped:
        name = getattr(func, "__name__", "").removeprefix("new_").removesuffix("_strided")
        if name in SIZED:
            wanted = _elements(name, (*args, *(v for k, v in (kwargs or {}).items() if k in ("size", "n", "m", "end"))))
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
    """How many elements a call asks for: its sizes in a list or one by one, or up to which number it counts."""
    listed = next((arg for arg in args if isinstance(arg, list | tuple)), None)
    if listed is not None:
        return math.prod(max(int(size), 0) for size in listed)
    numbers = [int(arg) for arg in args if isinstance(arg, int | float) and math.isfinite(arg)]
    if name in ("arange", "randperm", "linspace"):
        return max(map(abs, numbers), default=0)
    if name == "eye" and len(numbers) == 1:
        numbers *= 2
    return math.prod(max(size, 0) for size in numbers) if numbers else 0
