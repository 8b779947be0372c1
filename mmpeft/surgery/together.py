"""`Together`: several tunings active at once, as one weighted sum of updates."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.parts import Context, Delta, ExpertsDelta, Factor, LowRank
from mmpeft.parts.base import Hook, Part
from mmpeft.parts.scaled import Scaled


@dataclass(frozen=True, eq=False)
class Together:
    """Several tunings active at once: `h = W x + Σ_i w_i ΔW_i x`; those named in `unit` count as `ΔW_i / ‖ΔW_i‖`.

    A weight may be a scalar tensor that trains. `unit` divides by `‖B‖ ‖A‖` of each site's own factors. Other parts
    than updates of weights run at that strength, `y₀ + w (y₁ − y₀)`, where they are a change of what the base has.
    Parts that meet in one place and are no sum (adapters, gains of DoRA) are refused by `use`, as are tensor weights
    of them.
    """

    names: tuple[str, ...]
    weights: tuple[float | Tensor, ...] | None = None
    unit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "unit", tuple(self.unit))
        if isinstance(self.weights, Tensor):
            raise ConfigError("Together expects a sequence of weights, one for each name, got one tensor")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(f"Together expects different names, at least one, got {self.names}")
        if self.weights is not None and len(self.weights) != len(self.names):
            raise ConfigError(f"Together got {len(self.weights)} weights for {len(self.names)} names {self.names}")
        if set(self.unit) - set(self.names):
            raise ConfigError(f"unit={self.unit} names tunings that are not among {self.names}")

    def _key(self) -> tuple[object, ...]:
        weights = self.weights or (1.0,) * len(self.names)
        return self.names, tuple(id(w) if isinstance(w, Tensor) else float(w) for w in weights), self.unit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Together) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


Entry = str | Together | None
Route = Entry | tuple[Entry, ...]
"""One tuning's name, several `Together`, None for the plain backbone, or one of these for each row of the batch."""


def entries_of(route: Route) -> tuple[Entry, ...]:
    """What runs under a route, row by row or for all rows."""
    return route if isinstance(route, tuple) else (route,)


def names_of(route: Route) -> list[str]:
    """Every tuning that a route mentions, once."""
    found: dict[str, None] = {}
    for entry in entries_of(route):
        names = entry.names if isinstance(entry, Together) else (entry,)
        found.update({name: None for name in names if name is not None})
    return list(found)


class _Weighted(Factor):
    """`w ΔW` of another factor, over `‖ΔW‖` if `unit`; owns nothing."""

    def __init__(self, factor: Factor, weight: float | Tensor, unit: bool) -> None:
        nn.Module.__init__(self)
        self._of, self._weight, self.unit = (factor,), (weight,), unit

    def weight(self) -> float | Tensor:
        """The weight as it is now."""
        weight = self._weight[0]
        if not self.unit:
            return weight
        (factor,) = self._of
        tensors = factor.pair() if isinstance(factor, LowRank) else (factor.materialise(),)
        size = torch.stack([tensor.norm() for tensor in tensors]).prod()
        return weight / size.clamp_min(torch.finfo(size.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._of[0](x) * self.weight()
        return found

    def materialise(self) -> Tensor:
        return self._of[0].materialise() * self.weight()


class _WeightedLowRank(_Weighted, LowRank):
    """The same where A and B are asked for."""

    def pair(self) -> tuple[Tensor, Tensor]:
        (factor,) = self._of
        assert isinstance(factor, LowRank)
        down, up = factor.pair()
        return down, up * self.weight()

    def forward(self, x: Tensor) -> Tensor:
        return LowRank.forward(self, x)

    def materialise(self) -> Tensor:
        return LowRank.materialise(self)


class _WeightedDelta(Delta):
    """A `Delta` under a weight: a view that shares everything with it, owns nothing and is registered nowhere."""

    def __init__(self, delta: Delta, weight: float | Tensor, unit: bool) -> None:
        self.__dict__.update(copy.copy(delta.__dict__))
        kind = _WeightedLowRank if isinstance(delta.factor, LowRank) else _Weighted
        self.__dict__["_modules"] = {"factor": kind(delta.factor, weight, unit)}
        self.__dict__["_source"] = (delta,)
        del self.__dict__["training"]

    def tensors(self) -> Iterable[Tensor]:
        weight: object = self.factor._weight[0]  # type: ignore[index]  # a stacked factor
        return [*self.__dict__["_source"][0].tensors(), *([weight] if isinstance(weight, Tensor) else [])]

    @property
    def training(self) -> bool:  # type: ignore[override]  # a property over nn.Module's flag
        """That of the part itself, which alone hears of `train()` and `eval()`."""
        return bool(self.__dict__["_source"][0].training)


def weighted(part: Part, weight: float | Tensor, unit: bool) -> Part:
    """The part as it counts in a sum.

    Raises:
        Refused: the part has no strength, or a weight that trains and is not linear in what it adds.
    """
    if not (unit or isinstance(weight, Tensor) or weight != 1):
        return part
    reason = not_linear(part)
    if isinstance(part, ExpertsDelta):
        reason = reason or "updates of experts take plain numbers as weights, and no unit"
    if reason and (unit or isinstance(weight, Tensor)):
        raise Refused(f"{type(part).__name__} cannot be weighted in a sum: {reason}")
    if reason:
        assert not isinstance(weight, Tensor)
        return Scaled(part, weight)
    assert isinstance(part, Delta)
    return _WeightedDelta(part, weight, unit)


def not_linear(part: Part) -> str:
    """Why a part is no sum `W + Σ w_i ΔW_i`; empty when it is one."""
    if not isinstance(part, Delta | ExpertsDelta):
        return part.unmergeable or "it does not add to the result of a frozen weight"
    gained = part.magnitude is not None
    return "the gain of DoRA multiplies the whole row, base and other updates included" if gained else ""


def check_together(hooks: dict[str, list[tuple[Hook, Part]]]) -> None:
    """Raise Refused where parts of two tunings meet in one place and do not add up."""
    seen: dict[Hook, tuple[str, Part]] = {}
    for name, own in hooks.items():
        for hook, part in own:
            other = seen.get(hook)
            if other is not None and other[0] != name:
                for first, second in ((other, (name, part)), ((name, part), other)):
                    reason = "" if isinstance(first[1], Context) else not_linear(first[1])
                    if reason:
                        raise Refused(
                            f"{first[0]!r} and {second[0]!r} cannot run together: {type(first[1]).__name__} at "
                            f"{hook.path} does not add up with another part there: {reason}"
                        )
            seen.setdefault(hook, (name, part))
