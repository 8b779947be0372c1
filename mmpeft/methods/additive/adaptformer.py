"""AdaptFormer: an adapter beside the feed-forward network, on the residual stream before its norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.methods.base import register
from mmpeft.methods.needs import Refusal, at_site
from mmpeft.methods.shared.bottleneck import Parallel
from mmpeft.parts.base import Hook
from mmpeft.parts.branch import Scale, Source
from mmpeft.sites import Site


@register("https://arxiv.org/abs/2205.13535", "additive", mergeable=False)
@dataclass(frozen=True)
class AdaptFormer(Parallel):
    """`x' = x + MLP(norm(x)) + s U drop(relu(D x))`, outside LayerScale and DropPath; s = 0.1, size 64."""

    bottleneck: int | None = 64
    dropout: float = 0.1
    scale: float = 0.1

    source: ClassVar[Source] = "tap"
    refuses: ClassVar[tuple[Refusal, ...]] = (
        *Parallel.refuses,
        at_site(
            lambda site: not site.stream,
            "no module of this block sees the residual stream that the adapter reads; use ParallelAdapter, which reads "
            "the sub-layer's own input",
        ),
    )

    def learned_scale(self) -> Scale:
        return self.scale

    def hooks(self, model: nn.Module, site: Site) -> tuple[Hook, ...]:
        return (Hook(site.stream, "enter"), Hook(site.out or site.path, "exit"))
