"""Methods that are other methods, composed."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from mmpeft.methods.base import Method
from mmpeft.methods.former import place
from mmpeft.methods.placed import Placed, Tensors
from mmpeft.sites import Site


@dataclass(frozen=True)
class Recipe(Method):
    """A method with a name and few fields of its own that stands for a composition of others.

    `hidden` is the MLP behind a prefix, which `tuning.for_inference()` drops.
    """

    hidden: int = 512

    @property
    @abstractmethod
    def recipe(self) -> Method:
        """What it stands for."""

    def check(self, model: nn.Module, available: list[Site]) -> None:
        self.recipe.check(model, available)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placed = place(self.recipe, model, available)
        return replace(placed, bake=partial(self._bake, placed))

    def _bake(self, placed: Placed) -> tuple[Method, Tensors] | None:
        found = placed.baked()
        return found and (replace(self, hidden=0), found[1])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return self.recipe.count(model, available)
