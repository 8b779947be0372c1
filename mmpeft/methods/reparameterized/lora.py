"""LoRA: low-rank updates of linears, convolutions, embeddings and stacks of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.hosting.modules import module_at
from mmpeft.methods.base import PRODUCTS, Sited, register
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.recipe import fan, own_weight, positive, rate
from mmpeft.parts import Delta, ExpertsDelta, Factor, LowRank
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.delta import hook_kind
from mmpeft.sites import Kind, Selector, Site
from mmpeft.sites.selector import select


@register("https://arxiv.org/abs/2106.09685", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class LoRA(Sited):
    """`y = W x + b + s B A drop(x)`, `s = α/r` (rsLoRA: `α/√r`), A Kaiming-uniform, B zero.

    `rank_pattern` and `alpha_pattern` map selectors to values for the sites they match, the last match
    winning: `LoRA(rank=8, rank_pattern={"mlp.* & depth>=6": 16})`. The words an embedding looks up are not dropped.
    Of experts whose weights are one tensor `each` has its own A and B, or a pair is `shared` by all of them.
    Parameters: `r (i + o)` a site, that for each expert.
    """

    at: Selector = "attn.{q,v}"
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    experts: Literal["each", "shared"] = "each"

    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding", "experts")
    elsewhere: ClassVar[tuple[str, ...]] = PRODUCTS
    magnitude: ClassVar[bool] = False
    matrices: ClassVar[int] = 1
    """Products `B A` in one update."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, sitewise=True)

    def __post_init__(self) -> None:
        positive(self, rank=self.rank, alpha=self.alpha, **{f"rank of {k!r}": v for k, v in self.rank_pattern.items()})
        rate(self, dropout=self.dropout)
        if self.experts not in ("each", "shared"):
            raise ConfigError(f"{type(self).__name__}: experts must be 'each' or 'shared', got {self.experts!r}")

    def sized(self, available: list[Site]) -> list[tuple[Site, int, float]]:
        """Every chosen site with its rank and its scale."""
        found = self.chosen(available)
        ranks = _resolve("rank_pattern", self.rank_pattern, found, available, self.rank)
        alphas = _resolve("alpha_pattern", self.alpha_pattern, found, available, self.alpha)
        root = math.sqrt if self.rslora else float
        return [(site, int(ranks[site]), alphas[site] / root(ranks[site])) for site in found]

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        return Placed([self._one(model, *sized) for sized in self.sized(available)])

    def _one(self, model: nn.Module, site: Site, rank: int, scale: float) -> Placement:
        key = f"{type(self).__name__.lower()}_{site.label}"
        if site.kind == "experts":
            return self._stacked(model, site, rank, scale, key)
        module = module_at(model, site.path)
        grouped = getattr(module, "groups", 1) > 1
        lookup = site.kind == "embedding"
        weight = own_weight(model, site)
        dropout = 0.0 if lookup else self.dropout
        factor = self.factor(*fan(model, site), rank, weight, lookup)
        if grouped or site.via == "weight":
            hook = Hook(site.path, "read", site.tensor)
        else:
            hook = Hook(site.path, hook_kind(site.kind, factor))
        part = Delta(weight, factor, scale, site.rows, dropout, self.magnitude, site.transposed, lookup)
        return Placement(part, site.path, key, (hook,), site.role)

    def _stacked(self, model: nn.Module, site: Site, rank: int, scale: float, key: str) -> Placement:
        shared, own = self.experts == "shared", (site.rows, self.dropout, self.magnitude, site.transposed)
        part = ExpertsDelta(own_weight(model, site), rank, scale, *own, shared)
        return Placement(part, site.path, key, (Hook(site.path, "read", site.tensor),), site.role)

    def factor(self, rows: int, columns: int, rank: int, like: Tensor, lookup: bool) -> Factor:
        """What the update of one site is made of."""
        return LowRank(rows, columns, rank, like, lookup)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        total = 0
        for site, rank, _ in self.sized(available):
            rows, columns = fan(model, site)
            experts = len(own_weight(model, site)) if site.kind == "experts" else 1
            pairs = 1 if self.experts == "shared" else experts
            total += self.matrices * rank * (rows + columns) * pairs + (rows * experts if self.magnitude else 0)
        return total


def _resolve(
    name: str, patterns: Mapping[str, float], found: list[Site], available: list[Site], default: float
) -> dict[Site, float]:
    """The value of each site: the last pattern that names it, else the default."""
    values = dict.fromkeys(found, float(default))
    for pattern, value in patterns.items():
        named = [site for site in select(available, pattern) if site in values]
        if not named:
            raise ConfigError(f"{name}: {pattern!r} names none of the {len(found)} sites that at= selects")
        values.update(dict.fromkeys(named, float(value)))
    return values
