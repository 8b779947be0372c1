"""`Scaled`: another part at a strength between off and on, or beyond."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.parts.base import Hook, Part
from mmpeft.parts.product import Inner, StackReading, WeightProduct
from mmpeft.types import Attribute


class Scaled(Part):
    """`y₀ + α (y₁ − y₀)`: y₀ without the part, y₁ with it; a view that owns nothing and is registered nowhere.

    What holds for outputs holds for a tensor that the part answers for: `θ₀ + α (θ₁ − θ₀)`.
    """

    def __init__(self, part: Part, strength: float) -> None:
        """Raises Refused for a part that is more than a change of something the base has."""
        if not part.scalable:
            raise Refused(
                f"{type(part).__name__} has no strength between off and on: it is no change of what was there"
            )
        super().__init__()
        self._of, self.strength = (part,), strength
        self.order, self.rowwise = part.order, part.rowwise

    @property
    def answers(self) -> bool:
        return self._of[0].answers

    @property
    def needs_input(self) -> bool:
        return self._of[0].needs_input

    @property
    def stacked(self) -> bool:
        return self._of[0].stacked

    def one(self, expert: int) -> Part:
        return Scaled(self._of[0].one(expert), self.strength)

    def through_stack(self, reading: StackReading, inner: Inner, x: Tensor) -> Tensor:
        return self._between(inner(x), self._of[0].through_stack(reading, inner, x))

    @property
    def transposed(self) -> bool:
        return bool(getattr(self._of[0], "transposed", False))

    @property
    def rows(self) -> Attribute:
        return getattr(self._of[0], "rows", None)

    def tensors(self) -> Iterable[Tensor]:
        return self._of[0].tensors()

    def through(self, reading: WeightProduct, inner: Inner, x: Tensor) -> Tensor:
        return self._between(inner(x), self._of[0].through(reading, inner, x))

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        return self._between(x, self._of[0].enter(host, x))

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._between(y, self._of[0].exit(host, x, y))

    def read(self, host: nn.Module, name: str, base: Attribute) -> Attribute:
        tuned = self._of[0].read(host, name, base)
        return tuned * self.strength if base is None else self._between(base, tuned)

    def _between(self, without: Tensor, tuned: Tensor) -> Tensor:
        if tuned is without or not tuned.is_floating_point():  # a count of batches has no middle
            return tuned
        return torch.lerp(without, tuned, self.strength)

    @staticmethod
    def at(hook: Hook) -> Hook:
        """Where it enters for a hook of the part: what would replace a host's own call is added behind it."""
        return Hook(hook.path, "exit") if hook.kind == "call" else hook
