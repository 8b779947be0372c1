"""BitFit: the biases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.methods.base import own_weight, register
from mmpeft.methods.shared.tensors import TensorMethod, train_tensor
from mmpeft.parts import Mask
from mmpeft.parts.base import Hook, Placement
from mmpeft.sites import Site, select


@register("https://arxiv.org/abs/2106.10199", "selective", mergeable=True)
@dataclass(frozen=True)
class BitFit(TensorMethod):
    """Every bias vector trains, those of norms included; the head's is left to the head.

    Linears that have no bias (`create=True`) get one that starts at zero and folds into the layer.
    """

    create: bool = True

    created_roles: ClassVar[tuple[str, ...]] = ("attn", "cross", "mlp")

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        heads = {site.path for site in available if site.role == "head"}
        for site in available:
            owner, _, name = site.path.rpartition(".")
            vector = site.role == "param" and (name == "bias" or name.endswith("_bias")) and owner not in heads
            if vector and model.get_parameter(site.path).dim() == 1:
                yield site

    def missing(self, model: nn.Module, available: list[Site]) -> list[Site]:
        """Linears that are called, have no bias, and would read one."""
        within = select(available, self.at) if self.at else available
        return [
            site
            for site in within
            if self.create
            and site.kind == "linear"
            and site.via == "call"
            and site.role.split(".")[0] in self.created_roles
            and model.get_submodule(site.path)._parameters.get("bias", 0) is None
        ]

    def place(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        created = self._created(model, available)
        found = [] if created and not self._any(model, available) else self.chosen(model, available)
        placements = [train_tensor("bitfit", model, site) for site in found]
        for path, sites in created.items():
            weight = own_weight(model, sites[0])
            part = Mask(None, shape=(len(weight),), like=weight)
            placements.append(Placement(part, path, "bitfit_bias", (Hook(path, "read", "bias"),), "param"))
        return placements

    def count(self, model: nn.Module, available: list[Site]) -> int:
        created = self._created(model, available)
        held = super().count(model, available) if self._any(model, available) or not created else 0
        return held + sum(len(own_weight(model, sites[0])) for sites in created.values())

    def _created(self, model: nn.Module, available: list[Site]) -> dict[str, list[Site]]:
        paths: dict[str, list[Site]] = {}
        for site in self.missing(model, available):
            paths.setdefault(site.path, []).append(site)
        return paths

    def _any(self, model: nn.Module, available: list[Site]) -> bool:
        return next(iter(self.tensors(model, available)), None) is not None
