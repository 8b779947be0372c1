"""BitFit: the biases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.hosting.modules import module_at
from mmpeft.methods.base import register
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import identity, tensor_of
from mmpeft.methods.shared.tensors import TensorMethod, check_bits, elements, group_tied, train_tensors
from mmpeft.parts import Mask
from mmpeft.parts.base import Hook, Placement
from mmpeft.sites import Site
from mmpeft.sites.selector import select


@register("https://arxiv.org/abs/2106.10199", "selective", mergeable=True)
@dataclass(frozen=True)
class BitFit(TensorMethod):
    """Every bias vector trains, those of norms included; the head's is left to the head.

    Linears that have no bias (`create=True`) get one that starts at zero and folds into the layer.
    """

    create: bool = True

    created_roles: ClassVar[tuple[str, ...]] = ("attn", "cross", "mlp")

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        heads = tuple(site.path + "." for site in available if site.role == "head")
        params = [site for site in available if site.role == "param"]
        left = {identity(model, site.path) for site in params if heads and site.path.startswith(heads)}
        for site in params:
            name = site.path.rpartition(".")[2]
            vector = (name == "bias" or name.endswith("_bias")) and model.get_parameter(site.path).dim() == 1
            if vector and identity(model, site.path) not in left:  # BERT's has a second name
                yield site

    def check(self, model: nn.Module, available: list[Site]) -> None:
        found = self.found(model, available)
        check_bits(model, found)
        if not found and not self._created(model, available):
            raise self.nothing(available)

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
            and module_at(model, site.path)._parameters.get("bias", 0) is None
        ]

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements = train_tensors("bitfit", model, self.found(model, available))
        for path in self._created(model, available):
            weight = tensor_of(model, f"{path}.weight")
            part = Mask(None, shape=(len(weight),), like=weight)
            placements.append(Placement(part, path, "bitfit_bias", (Hook(path, "read", "bias"),), "param"))
        if not placements:
            raise self.nothing(available)
        return Placed(placements)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        held = sum(elements(model, group[0]) for group in group_tied(model, self.found(model, available)))
        return held + sum(len(tensor_of(model, f"{path}.weight")) for path in self._created(model, available))

    def _created(self, model: nn.Module, available: list[Site]) -> list[str]:
        """Modules that get a bias; a fused projection is one module for its three sites."""
        return list(dict.fromkeys(site.path for site in self.missing(model, available)))
