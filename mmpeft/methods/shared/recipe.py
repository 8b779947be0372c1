"""Methods that are other methods, composed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from mmpeft.controllers import Controller
from mmpeft.methods.base import Method
from mmpeft.parts.base import Placement
from mmpeft.sites import Site


@dataclass(frozen=True)
class Recipe(Method):
    """A method with a name and few fields of its own that stands for a composition of others.

    `hidden` is the MLP behind a prefix, which `tuning.bake()` drops.
    """

    hidden: int = 512

    @property
    @abstractmethod
    def recipe(self) -> Method:
        """What it stands for."""

    def check(self, model: nn.Module, available: list[Site]) -> None:
        self.recipe.check(model, available)

    def place(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        return self.recipe.place(model, available)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return self.recipe.count(model, available)

    def controllers(self, placements: Sequence[Placement]) -> list[Controller]:
        return self.recipe.controllers(placements)

    def compact(self, placements: Sequence[Placement]) -> tuple[Method, list[dict[str, Tensor]]]:
        recipe = self.recipe
        method, tensors = recipe.compact(placements)
        return (self if method is recipe else replace(self, hidden=0)), tensors
