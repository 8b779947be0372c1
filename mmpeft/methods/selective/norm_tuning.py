"""Norm tuning: the affine parameters of every normalisation layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.methods.base import register
from mmpeft.methods.needs import Need
from mmpeft.methods.shared.tensors import TensorMethod
from mmpeft.sites import Site


@register("https://arxiv.org/abs/2312.11420", "selective", mergeable=True)
@dataclass(frozen=True)
class NormTuning(TensorMethod):
    """Weight and bias of the sites of role `norm` train; running statistics stay (`+ BatchStatistics()` moves them)."""

    needs: ClassVar[tuple[Need, ...]] = (Need("norms that hold a weight or bias", "norm", tensors=True),)

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        norms = {site.path for site in available if site.role == "norm"}
        return (site for site in available if site.role == "param" and site.path.rpartition(".")[0] in norms)
