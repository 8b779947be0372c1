"""`Shared`: tensors owned once and viewed from many sites."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import nn

from mmpeft.parts.base import Part, Placement

M = TypeVar("M", bound=nn.Module)


class Shared(Part, Generic[M]):
    """Owns what many parts read: a tensor, a generator, a bank. It enters nothing itself and is registered once.

    Parts that read it hold a `View` of it, so that no tensor is registered twice.
    """

    def __init__(self, owned: M) -> None:
        super().__init__()
        self.owned = owned

    def placed(self, key: str) -> Placement:
        """The placement of what is shared: under the model itself."""
        return Placement(self, "", key, (), "shared")

    def view(self) -> View[M]:
        return View(self.owned)


class View(Generic[M]):
    """A module that another part owns: called, it gives the module; copies and pickles of the model carry it along."""

    def __init__(self, module: M) -> None:
        self._module = module  # no nn.Module holds it as a child, so nothing is registered

    def __call__(self) -> M:
        return self._module
