"""Full fine-tuning, as a method among the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmpeft.methods.base import register
from mmpeft.methods.shared.statistics import WholeModules
from mmpeft.sites import Site


@register("", "selective", mergeable=True, trains_head=True)
@dataclass(frozen=True)
class Full(WholeModules):
    """Every tensor trains, and running statistics follow the data.

    The base is kept beside the trained copy, so that it can be switched off or detached.
    """

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        return (site for site in available if site.role == "param")
