"""AdapterDrop: a method trained so that its lower layers can be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from mmpeft.controllers.layers import RandomLayers
from mmpeft.errors import ConfigError
from mmpeft.methods.additive.pfeiffer import Pfeiffer
from mmpeft.methods.base import Method, register, with_depth
from mmpeft.methods.compose import Restricted, Wrapped
from mmpeft.methods.former import place
from mmpeft.methods.placed import Placed, Tensors, everything
from mmpeft.parts.base import Placement
from mmpeft.sites import Site


@register("https://arxiv.org/abs/2010.11918", "efficient", mergeable=False, identity=False)
@dataclass(frozen=True)
class AdapterDrop(Wrapped):
    """`method` without its parts in the first `n ~ U{0, …, drop}` blocks, drawn anew for each step.

    `drop` is by default all blocks but the last. At inference `tuning.leave_out(n)` runs the first n blocks plain:
    no time is spent there, and several tasks can share what those blocks compute; `for_inference()` and
    `save(inference=True)` then keep the other blocks' parts alone. Below the lowest part that runs nothing needs a
    gradient. To train with a
    fixed n, use `method.where("depth>=n")`.

    With DDP the parts that rest have no gradient in a step: `strategy=ddp_find_unused_parameters_true`.
    """

    method: Method = field(default_factory=Pfeiffer)
    drop: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or not self.method.sitewise:
            raise ConfigError(
                f"AdapterDrop leaves out parts that act at one site each, such as adapters or LoRA; got {self.method!r}"
            )
        if self.drop is not None and self.drop < 0:
            raise ConfigError(f"AdapterDrop: drop is a number of blocks, got {self.drop}")

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placed = place(self.method, model, available)
        placements = with_depth(placed.placements, available)
        deepest = max(p.depth for p in placements)
        if (self.drop or 0) > deepest:
            raise ConfigError(
                f"AdapterDrop: drop={self.drop} leaves no block with a part; the deepest is at depth {deepest}"
            )
        layers = RandomLayers(placements, deepest if self.drop is None else self.drop)
        return Placed(placements, [*placed.controllers, layers], partial(self._bake_running, placed, placements))

    def _bake_running(self, placed: Placed, placements: Sequence[Placement]) -> tuple[Method, Tensors]:
        """The method itself, at the blocks whose parts run."""
        method, tensors = placed.baked() or (self.method, everything(placements))
        lowest = 1 + max((p.depth for p in placements if p.part.resting), default=-1)
        if not lowest:
            return method, tensors
        kept = [own for own, p in zip(tensors, placements, strict=True) if not p.part.resting]
        return Restricted(method, f"depth>={lowest}"), kept
