"""Methods written for the former contract, which gave controllers and what is left in functions of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from mmpeft.controllers.base import Controller
from mmpeft.errors import ConfigError
from mmpeft.methods.placed import Placed, Tensors, everything
from mmpeft.parts.base import Placement
from mmpeft.sites import Site

if TYPE_CHECKING:
    from mmpeft.methods.base import Method

_PLACED: ContextVar[Placed] = ContextVar("placed")
"""What the method whose former function runs was placed as, for `super()` in it."""


class FormerContract:
    """The former functions, for methods that override them and call `super()`."""

    def controllers(self, placements: Sequence[Placement]) -> list[Controller]:
        """Deprecated: `place` gives them."""
        return list(_placed("controllers").controllers)

    def compact(self, placements: Sequence[Placement]) -> tuple[Method, Tensors]:
        """Deprecated: `place` gives it, as `bake`; `tuning.inference_form()` asks for it."""
        return _placed("compact").baked() or (self, everything(placements))  # type: ignore[return-value]  # same pair


def _placed(name: str) -> Placed:
    try:
        return _PLACED.get()
    except LookupError:
        raise ConfigError(
            f"Method.{name}(placements) is no more: what method.place(model, sites) gives has `controllers` and "
            "`bake`, an attached tuning has `controllers` and `inference_form()`"
        ) from None


@contextmanager
def _as(placed: Placed) -> Iterator[None]:
    token = _PLACED.set(placed)
    try:
        yield
    finally:
        _PLACED.reset(token)


def place(method: Method, model: nn.Module, available: list[Site]) -> Placed:
    """What a method places, also one that gives a list of placements, or has functions of the former contract."""
    given = method.place(model, available)
    placed = given if isinstance(given, Placed) else Placed(list(given))
    former = [name for name in ("controllers", "compact") if _overrides(method, name)]
    if former:
        warnings.warn(
            f"{type(method).__name__} overrides {' and '.join(former)}: give controllers and bake with what place "
            "returns, a mmpeft.methods.Placed",
            DeprecationWarning,
            stacklevel=2,
        )
    if "controllers" in former:
        with _as(placed):
            placed = replace(placed, controllers=method.controllers(placed.placements))
    return replace(placed, bake=partial(_compact, method, placed)) if "compact" in former else placed


def _overrides(method: Method, name: str) -> bool:
    return getattr(type(method), name) is not getattr(FormerContract, name)


def _compact(method: Method, placed: Placed) -> tuple[Method, Tensors] | None:
    with _as(placed):
        found = method.compact(placed.placements)
    return None if found[0] is method else found
