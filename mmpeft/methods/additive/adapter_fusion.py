"""AdapterFusion: trained adapters stay as they are, attention over them is learned."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mmpeft.controllers.objective import NearIdentity
from mmpeft.controllers.scores import Loss, default_loss
from mmpeft.errors import ConfigError, Refused
from mmpeft.hosting.modules import module_at
from mmpeft.methods.base import Method, register
from mmpeft.methods.former import place
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.recipe import first_tensor, positive
from mmpeft.methods.saved import read_adapter
from mmpeft.parts import Branch
from mmpeft.parts.fusion import FusedAdapters
from mmpeft.sites import Site
from mmpeft.types import Batch


@register("https://arxiv.org/abs/2005.00247", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class AdapterFusion(Method):
    """`h ← h + W_v Σ_n α_n z_n`, `α = softmax_n((W_q h)·(W_k z_n) / T)` over N trained adapters, which stay frozen.

    `adapters` are folders of saved bottleneck adapters of one base, all on the same sites. They are read when the
    method is attached; from then on `members` names their methods and their tensors belong to the fusion, which is
    saved with them and needs the folders no more: its file holds N adapters beside what trains. The loss gets
    `regularization Σ ‖I - W_v‖²`. Parameters: `3 d²` a site.
    """

    adapters: Sequence[str]
    temperature: float = 1.0
    regularization: float = 0.01
    members: Sequence[Method] = ()

    def __post_init__(self) -> None:
        positive(self, temperature=self.temperature)

    @property
    def traits(self) -> Traits:
        return replace(super().traits, sitewise=True, decided=bool(self.members))

    def resolve(self, model: nn.Module, data: Iterable[Batch] = (), loss: Loss = default_loss) -> Method:
        """With the adapters read.

        Raises:
            ConfigError: fewer than two. Refused: no bottleneck adapters, or on other sites than the first.
            AdapterFileError: a folder that cannot be read, or made for another base.
        """
        if self.members:
            return self
        if len(self.adapters) < 2:
            raise ConfigError(f"AdapterFusion fuses at least two saved adapters, got adapters={list(self.adapters)!r}")
        found = [read_adapter(model, folder) for folder in self.adapters]
        for adapter in found:
            if not all(type(p.part) is Branch for p in adapter.placements):
                raise Refused(f"AdapterFusion fuses bottleneck adapters; {adapter.where} holds {adapter.method}")
            if [p.hooks for p in adapter.placements] != [p.hooks for p in found[0].placements]:
                raise Refused(
                    f"AdapterFusion needs adapters on the same sites: {found[0].where} is {found[0].method}, "
                    f"{adapter.where} is {adapter.method}"
                )
        fused = replace(self, adapters=(), members=[adapter.method for adapter in found])
        # No field: what a file says of the method are names, the tensors stand beside it.
        object.__setattr__(fused, "_sources", [adapter.placements for adapter in found])
        return fused

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        sources = self.__dict__.get("_sources")
        columns = sources or [_empty(place(member, model, available)) for member in self.members]
        placements = []
        for row in zip(*columns, strict=True):
            adapters = [copy.deepcopy(p.part) for p in row]
            width = _width(adapters[0])
            like = first_tensor(module_at(model, row[0].home))
            like = first_tensor(model) if like is None else like
            assert like is not None
            part = FusedAdapters(adapters, width, self.temperature, like)
            placements.append(replace(row[0], part=part, key=f"fusion_{row[0].role.replace('.', '_')}"))
        fused = [p.part for p in placements if isinstance(p.part, FusedAdapters)]
        return Placed(placements, [NearIdentity(fused, self.regularization)])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(3 * _width(p.part) ** 2 for p in place(self.members[0], model, available))


def _width(part: nn.Module) -> int:
    """Channels a branch reads and writes."""
    assert isinstance(part, Branch)
    return len(part.up.bias)  # type: ignore[arg-type]  # a branch always has it


def _empty(placements: Placed) -> Placed:
    """Adapters that a file is still to fill; until then their answer is NaN, not silently nothing."""
    with torch.no_grad():
        for placement in placements:
            for parameter in placement.part.parameters():
                parameter.fill_(torch.nan)
    return placements
