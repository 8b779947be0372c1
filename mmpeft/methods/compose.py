"""Methods made of methods: several as one, one on fewer sites, and what wraps one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import nn

from mmpeft.controllers.scores import Loss, default_loss
from mmpeft.errors import ConfigError
from mmpeft.functional.rows import Rows
from mmpeft.methods.base import COMPOSED, Method, MethodInfo
from mmpeft.methods.former import place
from mmpeft.methods.placed import Placed, Tensors, Traits, everything
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.mask import Mask
from mmpeft.parts.statistics import Statistics
from mmpeft.sites import Selector, Site
from mmpeft.sites.selector import select
from mmpeft.types import Batch


def united(first: Method, second: Method) -> Union:
    """Two methods as one; unions are opened."""
    members = [list(m.methods) if isinstance(m, Union) else [m] for m in (first, second)]
    return Union([*members[0], *members[1]])


@dataclass(frozen=True)
class Frozen(Method):
    """Nothing of the backbone trains; for tasks whose own parts do, and for what needs no training."""

    info: ClassVar[MethodInfo] = MethodInfo("Frozen", "", "selective", mergeable=True, identity=True)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        return Placed([])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return 0


@dataclass(frozen=True)
class Union(Method):
    """Several methods as one: every part of each."""

    info: ClassVar[MethodInfo] = MethodInfo("Union", "", "hybrid", mergeable=True, identity=True)
    methods: Sequence[Method] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("Union needs at least one method, got none")
        for method in self.methods:
            if not isinstance(method, Method):
                raise ConfigError(f"Union unites methods, got {type(method).__name__}: {method!r}")

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placed = [place(method, model, available) for method in self.methods]
        kept = self._kept(placed)
        return Placed(
            [p for own in kept for p in own],
            [controller for own in placed for controller in own.controllers],
            partial(self._bake, placed, kept),
        )

    def _kept(self, placed: Sequence[Placed]) -> list[list[Placement]]:
        """The placements of each method, under keys that differ.

        Raises:
            ConfigError: two methods would train the same rows of a tensor.
        """
        taken: set[tuple[str, str]] = set()
        owners: dict[tuple[Hook, Rows | None], str] = {}
        kept: list[list[Placement]] = []
        for method, own in zip(self.methods, placed):
            kept.append([])
            for p in own:
                if isinstance(p.part, Statistics):  # the data move them, whichever methods ask for it
                    if (p.hooks[0], None) in owners:
                        continue
                    owners[p.hooks[0], None] = type(method).__name__
                if isinstance(p.part, Mask):
                    tensor = (p.hooks[0], p.part.rows)
                    if tensor in owners:
                        raise ConfigError(
                            f"{p.hooks[0].path}.{p.hooks[0].name} would be trained by both {owners[tensor]} and "
                            f"{type(method).__name__}; restrict one with .where(...)"
                        )
                    owners[tensor] = type(method).__name__
                key, copy = p.key, 1
                while (p.home, key) in taken:
                    key, copy = f"{p.key}_{copy}", copy + 1
                taken.add((p.home, key))
                kept[-1].append(replace(p, key=key))
        return kept

    def _bake(self, placed: Sequence[Placed], kept: Sequence[Sequence[Placement]]) -> tuple[Method, Tensors] | None:
        found = [own.baked() for own in placed]
        if not any(found):
            return None
        left = [one or (method, everything(own)) for one, method, own in zip(found, self.methods, kept)]
        return Union([method for method, _ in left]), [tensors for _, own in left for tensors in own]

    def check(self, model: nn.Module, available: list[Site]) -> None:
        for method in self.methods:
            method.check(model, available)

    @property
    def traits(self) -> Traits:
        return Traits.of_all(self.methods)

    def resolve(self, model: nn.Module, data: Iterable[Batch] = (), loss: Loss = default_loss) -> Method:
        return Union([method.resolve(model, data, loss) for method in self.methods])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(method.count(model, available) for method in self.methods)


@dataclass(frozen=True)
class Wrapped(Method):
    """A method around another one, which it asks for whatever it does not change."""

    method: Method

    def check(self, model: nn.Module, available: list[Site]) -> None:
        self.method.check(model, available)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placed = place(self.method, model, available)
        return replace(placed, bake=partial(self._bake, placed)) if placed.bake else placed

    def _bake(self, placed: Placed) -> tuple[Method, Tensors] | None:
        found = placed.baked()
        return found and (replace(self, method=found[0]), found[1])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return self.method.count(model, available)

    @property
    def traits(self) -> Traits:
        return Traits.of(self.method)

    def resolve(self, model: nn.Module, data: Iterable[Batch] = (), loss: Loss = default_loss) -> Method:
        if self.decided:
            return self
        raise ConfigError(f"{type(self.method).__name__} chooses among what its own at= selects: set that")


@dataclass(frozen=True)
class Restricted(Wrapped):
    """A method on fewer sites."""

    info: ClassVar[MethodInfo] = MethodInfo("Restricted", "", "hybrid", mergeable=True, identity=True)
    at: Selector

    def check(self, model: nn.Module, available: list[Site]) -> None:
        super().check(model, select(available, self.at))

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        return super().place(model, select(available, self.at))

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return super().count(model, select(available, self.at))


COMPOSED |= {"+": united, "where": Restricted}
