"""Linear probing: the head alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.methods.base import register
from mmpeft.methods.needs import Need
from mmpeft.methods.shared.statistics import WholeModules
from mmpeft.sites import Site


@register("", "selective", mergeable=True, trains_head=True)
@dataclass(frozen=True)
class LinearProbe(WholeModules):
    """Only the sites of role `head` train, running statistics of norms in them included."""

    needs: ClassVar[tuple[Need, ...]] = (Need("a task head", "head", tensors=True),)

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        heads = tuple(site.path + "." for site in available if site.role == "head")
        return (site for site in available if site.role == "param" and heads and site.path.startswith(heads))
