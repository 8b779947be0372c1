"""What placing a method gives, and what is so of a method with its options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor

from mmpeft.controllers.base import Controller
from mmpeft.parts.base import Placement

if TYPE_CHECKING:
    from mmpeft.methods.base import Method

Tensors = list[dict[str, Tensor]]
"""Of each placement, its part's tensors by name."""

Bake = Callable[[], "tuple[Method, Tensors] | None"]
"""What is left of trained parts when only the forward pass counts: a method, and the tensors of its placements in the
order in which it places them; None where that is everything. Copied and pickled with its model: a partial of a function
or method, no lambda."""


@dataclass(frozen=True)
class Placed:
    """All that follows from placing a method: parts where they stand, what drives them, and what is left of them.

    Reads as the sequence of its placements.
    """

    placements: Sequence[Placement]
    controllers: Sequence[Controller] = ()
    bake: Bake | None = None
    """None where everything is left."""

    def __iter__(self) -> Iterator[Placement]:
        return iter(self.placements)

    def __len__(self) -> int:
        return len(self.placements)

    def __getitem__(self, index: int) -> Placement:
        return self.placements[index]

    def baked(self) -> tuple[Method, Tensors] | None:
        """What `bake` gives; None where everything is left."""
        return self.bake() if self.bake is not None else None


def everything(placements: Sequence[Placement]) -> Tensors:
    """All tensors of parts, those that never train too."""
    return [{**dict(p.part.named_parameters()), **p.part.frozen()} for p in placements]


@dataclass(frozen=True)
class Traits:
    """What is so of a method with its options."""

    mergeable: bool
    identity: bool
    """Whether the tuned model equals the base bit for bit at initialisation."""
    trains_head: bool = False
    sitewise: bool = False
    """Whether each part acts at its own site alone, so that any of them can be left out."""
    decided: bool = True
    """Whether what trains follows from the model's sites alone; if not, `resolve` gives the method that is."""
    needs_data: bool = False
    """Whether `resolve` must see batches."""

    @classmethod
    def of(cls, method: Method) -> Traits:
        """Those of any method, also of one that has them as properties of its own."""
        return cls(**{f.name: getattr(method, f.name) for f in fields(cls)})

    @classmethod
    def of_all(cls, methods: Sequence[Method]) -> Traits:
        """Those of several methods at work together."""
        own = [cls.of(method) for method in methods]
        return cls(
            mergeable=all(traits.mergeable for traits in own),
            identity=all(traits.identity for traits in own),
            trains_head=any(traits.trains_head for traits in own),
            sitewise=all(traits.sitewise for traits in own),
            decided=all(traits.decided for traits in own),
            needs_data=any(traits.needs_data for traits in own),
        )
