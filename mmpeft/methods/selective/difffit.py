"""DiffFit: biases, norms, class embeddings and a gain behind every sub-layer of a diffusion transformer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmpeft.methods.base import register
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import fan, own_weight
from mmpeft.methods.selective.bitfit import BitFit
from mmpeft.methods.selective.norm_tuning import NormTuning
from mmpeft.methods.shared.rescaling import place_rescale
from mmpeft.methods.shared.tensors import TensorMethod
from mmpeft.sites import Site
from mmpeft.sites.selector import select

GAINS = ("attn.out", "cross.out", "mlp.down")


@register("https://arxiv.org/abs/2304.06648", "selective", mergeable=True)
@dataclass(frozen=True)
class DiffFit(TensorMethod):
    """Biases, norms' weights and tables of classes train, and `y ← γ ⊙ y` behind every sub-layer, γ starting at 1.

    γ acts on the output of the sub-layer's last projection, before the residual sum (and before the time step's
    gate). Parameters: those tensors' elements, and one γ for each of their outputs.
    """

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        tables = {f"{site.path}.weight" for site in available if site.role == "time" and site.kind == "embedding"}
        found = [*BitFit().tensors(model, available), *NormTuning().tensors(model, available)]
        found += [site for site in available if site.role == "param" and site.path in tables]
        return list(dict.fromkeys(found))

    def gains(self, available: list[Site]) -> list[Site]:
        """The projections that end a sub-layer."""
        within = select(available, self.at) if self.at else available
        return [site for site in within if site.role in GAINS and site.kind == "linear" and not site.refuse]

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        gains = [
            place_rescale("difffit", model, site, own_weight(model, site), side="output", shift=False)
            for site in self.gains(available)
        ]
        return Placed([*super().place(model, available), *gains])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return super().count(model, available) + sum(fan(model, site)[0] for site in self.gains(available))
