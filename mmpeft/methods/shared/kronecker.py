"""Kronecker-factored updates: how a weight is split, and where the part stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.functional.kron import balanced_factor
from mmpeft.hosting.modules import module_at
from mmpeft.methods.base import PRODUCTS, Method, SiteMethod
from mmpeft.methods.recipe import fan, own_weight
from mmpeft.parts import Delta, Factor
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.delta import hook_kind
from mmpeft.sites import Site


@dataclass(frozen=True)
class Kronecker(SiteMethod):
    """`s L ⊗ R` with `L` [a, c] and `R` [b, d] where `a b = o` and `c d = i`; L Kaiming-uniform, R zero.

    `left` is `(a, c)`; by default the divisors nearest to `√o` and `√i` from below, which takes the fewest parameters.
    """

    left: Sequence[int] = ()

    elsewhere: ClassVar[tuple[str, ...]] = PRODUCTS

    def __post_init__(self) -> None:
        if self.left and (len(self.left) != 2 or min(self.left) < 1):
            raise ConfigError(f"{type(self).__name__}: left is (rows, columns) of the first factor, got {self.left!r}")

    def shapes(
        self, site: Site, rows: int, columns: int, default: Sequence[int] = ()
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two factors of a [rows, columns] update."""
        a, c = self.left or default or (balanced_factor(rows), balanced_factor(columns))
        if rows % a or columns % c:
            raise Refused(
                f"{type(self).__name__} at {site}: left=({a}, {c}) does not divide [{rows}, {columns}]; "
                "choose divisors of both, or leave left to the default"
            )
        return (a, c), (rows // a, columns // c)

    def size(self, model: nn.Module, site: Site) -> tuple[int, int]:
        """Rows and columns of the update of a site."""
        return fan(model, site)

    def count_at(self, model: nn.Module, site: Site) -> int:
        (a, c), (b, d) = self.shapes(site, *self.size(model, site))
        return a * c + b * d


def place_kron(
    method: Method, key: str, model: nn.Module, site: Site, factor: Factor, scale: float, dropout: float
) -> Placement:
    """An update by a factor that is applied beside the host's own output, or read with the weight."""
    whole = site.via == "weight" or getattr(module_at(model, site.path), "groups", 1) > 1
    hook = Hook(site.path, "read", site.tensor) if whole else Hook(site.path, hook_kind(site.kind, factor))
    part = Delta(own_weight(model, site), factor, scale, site.rows, dropout, transposed=site.transposed)
    return Placement(part, site.path, f"{key}_{site.label}", (hook,), site.role)
