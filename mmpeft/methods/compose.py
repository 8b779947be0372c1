"""Methods made of methods: several as one, one on fewer sites, and what wraps one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from mmpeft.controllers.base import Controller
from mmpeft.controllers.scores import Loss, default_loss
from mmpeft.errors import ConfigError
from mmpeft.functional.rows import Rows
from mmpeft.methods.base import Method, MethodInfo
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.mask import Mask
from mmpeft.parts.statistics import Statistics
from mmpeft.sites import Selector, Site
from mmpeft.sites.selector import select


def united(first: Method, second: Method) -> Union:
    """Two methods as one; unions are opened."""
    members = [list(m.methods) if isinstance(m, Union) else [m] for m in (first, second)]
    return Union([*members[0], *members[1]])


@dataclass(frozen=True)
class Frozen(Method):
    """Nothing of the backbone trains; for tasks whose own parts do, and for what needs no training."""

    info: ClassVar[MethodInfo] = MethodInfo("Frozen", "", "selective", mergeable=True, identity=True)

    def place(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        return []

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

    def place(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        placements: list[Placement] = []
        taken: set[tuple[str, str]] = set()
        owners: dict[tuple[Hook, Rows | None], str] = {}
        for number, method in enumerate(self.methods):
            for p in method.place(model, available):
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
                placements.append(replace(p, key=key, owners=(*p.owners, number)))
        return placements

    def check(self, model: nn.Module, available: list[Site]) -> None:
        for method in self.methods:
            method.check(model, available)

    @property
    def decided(self) -> bool:
        return all(method.decided for method in self.methods)

    @property
    def needs_data(self) -> bool:
        return any(method.needs_data for method in self.methods)

    def resolve(self, model: nn.Module, data: Iterable[Any] = (), loss: Loss = default_loss) -> Method:
        return Union([method.resolve(model, data, loss) for method in self.methods])

    def controllers(self, placements: Sequence[Placement]) -> list[Controller]:
        shares = self._shares(placements)
        return [c for method, own in zip(self.methods, shares) for c in method.controllers(own)]

    def _shares(self, placements: Sequence[Placement]) -> list[list[Placement]]:
        """Placements by the method they belong to."""
        return [
            [replace(p, owners=p.owners[:-1]) for p in placements if p.owners[-1] == number]
            for number in range(len(self.methods))
        ]

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(method.count(model, available) for method in self.methods)

    def compact(self, placements: Sequence[Placement]) -> tuple[Method, list[dict[str, Tensor]]]:
        shares = zip(self.methods, self._shares(placements))
        found = [method.compact(own) for method, own in shares]
        if all(method is before for (method, _), before in zip(found, self.methods)):
            return super().compact(placements)
        return Union([method for method, _ in found]), [tensors for _, own in found for tensors in own]

    @property
    def sitewise(self) -> bool:
        return all(method.sitewise for method in self.methods)

    @property
    def mergeable(self) -> bool:
        return all(method.mergeable for method in self.methods)

    @property
    def identity(self) -> bool:
        return all(method.identity for method in self.methods)

    @property
    def trains_head(self) -> bool:
        return any(method.trains_head for method in self.methods)


@dataclass(frozen=True)
class Wrapped(Method):
    """A method around another one, which it asks for whatever it does not change."""

    method: Method

    def check(self, model: nn.Module, available: list[Site]) -> None:
        self.method.check(model, available)

    def place(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        return self.method.place(model, available)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return self.method.count(model, available)

    @property
    def decided(self) -> bool:
        return self.method.decided

    def resolve(self, model: nn.Module, data: Iterable[Any] = (), loss: Loss = default_loss) -> Method:
        if self.decided:
            return self
        raise ConfigError(f"{type(self.method).__name__} chooses among what its own at= selects: set that")

    def controllers(self, placements: Sequence[Placement]) -> list[Controller]:
        return self.method.controllers(placements)

    def compact(self, placements: Sequence[Placement]) -> tuple[Method, list[dict[str, Tensor]]]:
        method, tensors = self.method.compact(placements)
        return (self if method is self.method else replace(self, method=method)), tensors

    @property
    def sitewise(self) -> bool:
        return self.method.sitewise

    @property
    def mergeable(self) -> bool:
        return self.method.mergeable

    @property
    def identity(self) -> bool:
        return self.method.identity

    @property
    def trains_head(self) -> bool:
        return self.method.trains_head


@dataclass(frozen=True)
class Restricted(Wrapped):
    """A method on fewer sites."""

    info: ClassVar[MethodInfo] = MethodInfo("Restricted", "", "hybrid", mergeable=True, identity=True)
    at: Selector

    def check(self, model: nn.Module, available: list[Site]) -> None:
        super().check(model, select(available, self.at))

    def place(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        return super().place(model, select(available, self.at))

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return super().count(model, select(available, self.at))
