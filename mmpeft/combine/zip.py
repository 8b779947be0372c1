"""ZipLoRA: two low-rank updates in one, each input column with a weight of its own that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.functional.rows import Rows
from mmpeft.methods.base import Method, MethodInfo
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import own_weight
from mmpeft.parts import Delta, Hadamard, LowRank
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.factors import like_options
from mmpeft.sites import Site
from mmpeft.surgery.attaching import attach
from mmpeft.tuning import Tuning

Pair = tuple[Tensor, Tensor]
Key = tuple[str, Rows | None, tuple[Hook, ...]]


class Zipped(LowRank):
    """`ΔW = Σ_k s_k B_k A_k diag(m_k)`: A and B stay as they are, the columns' weights m_k [i] train."""

    def __init__(self, pairs: Sequence[Pair], starts: Sequence[float]) -> None:
        nn.Module.__init__(self)  # nothing of its own to draw: A and B are others'
        for number, (down, up) in enumerate(pairs):
            self.register_buffer(f"A{number}", down.detach().clone(), persistent=False)
            self.register_buffer(f"B{number}", up.detach().clone(), persistent=False)
        self.weights = nn.ParameterList(
            torch.full((down.shape[1],), start, **like_options(down)) for (down, _), start in zip(pairs, starts)
        )

    def pair(self) -> Pair:
        downs = [getattr(self, f"A{k}") * weight for k, weight in enumerate(self.weights)]
        return torch.cat(downs), torch.cat([getattr(self, f"B{k}") for k in range(len(downs))], 1)

    def overlap(self) -> Tensor:
        """`Σ_{j<k} mean |m_j ⊙ m_k|`: 0 where no column is used by two updates."""
        own = list(self.weights)
        terms = [(a * b).abs().mean() for k, b in enumerate(own) for a in own[:k]]
        return torch.stack(terms).sum() if terms else own[0].new_zeros(())


@dataclass(frozen=True)
class ZipLoRA(Method):
    """`W + Σ_k ΔW_k diag(m_k)` over all sites of several low-rank tunings; `zip_lora` makes it."""

    info: ClassVar[MethodInfo] = MethodInfo("ZipLoRA", "https://arxiv.org/abs/2311.13600", "hybrid", True, False)
    tunings: Sequence[Tuning] = ()
    starts: Sequence[float] = ()

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        sites = {(site.path, site.rows): site for site in available if site.kind != "param"}
        found: dict[Key, list[tuple[Placement, float]]] = {}
        for tuning, start in zip(self.tunings, self.starts, strict=True):
            for placement in tuning.placements:
                key = (placement.home, getattr(placement.part, "rows", None), placement.hooks)
                found.setdefault(key, []).append((placement, start))
        return Placed([self._one(model, sites[home, rows], own) for (home, rows, _), own in found.items()])

    def _one(self, model: nn.Module, site: Site, own: Sequence[tuple[Placement, float]]) -> Placement:
        pairs = []
        for placement, _ in own:
            part = placement.part
            factor = part.factor if isinstance(part, Delta) and part.magnitude is None else part
            if not isinstance(factor, LowRank | Hadamard):
                raise Refused(
                    f"{type(factor).__name__} at {placement.home}: updates are put together column by column where "
                    "they are low-rank products, as in LoRA and LoHa; DoRA's lengths and other parts are not. "
                    "Run them as a weighted sum (mmpeft sample, or mmpeft.Together)"
                )
            down, up = factor.pair()
            assert isinstance(part, Delta)
            pairs.append((down, up * part.scale))
        first = own[0][0]
        part = Delta(
            own_weight(model, site),
            Zipped(pairs, [start for _, start in own]),
            1.0,
            site.rows,
            transposed=site.transposed,
            lookup=site.kind == "embedding",
        )
        return replace(first, part=part, key=f"zip_{site.label}")

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(part.numel() for p in self.place(model, available) for part in p.part.parameters())


def zip_lora(tunings: Sequence[Tuning], starts: Sequence[float] | None = None, name: str = "zip") -> Tuning:
    """A tuning whose low-rank updates are those of several, `Σ_k ΔW_k diag(m_k)`, m_k starting at `starts` (1).

    Untrained it is their weighted sum. To train it: the answers of each tuning for what it was made for, and
    `penalty(tuning)` so that no column serves two. It exports like any LoRA, of the sum of their ranks.

    Raises:
        ConfigError: fewer than two tunings, or of different models. Refused: a part is no low-rank update.
        Paper: https://arxiv.org/abs/2311.13600
    """
    models = {id(tuning.model) for tuning in tunings}
    if len(tunings) < 2 or len(models) > 1:
        raise ConfigError(
            f"zip_lora takes two tunings or more of one model, got {len(tunings)} of {len(models)} models"
        )
    model = tunings[0].model
    attach(model, ZipLoRA(tunings, starts or [1.0] * len(tunings)), name)
    return Tuning(model, name)


def penalty(tuning: Tuning) -> Tensor:
    """Mean over sites of the weights' overlap `mean |m_j ⊙ m_k|`."""
    parts = [p.part for p in tuning.placements if isinstance(p.part, Delta)]
    found = [part.factor.overlap() for part in parts]  # type: ignore[operator]  # ZipLoRA's own factor
    return torch.stack(found).mean()
