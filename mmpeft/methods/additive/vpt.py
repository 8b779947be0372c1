"""Visual prompt tuning, shallow and deep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.methods.base import Sited, register
from mmpeft.methods.needs import Refusal
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import any_tensor, own_weight, positive, rate
from mmpeft.parts import Context
from mmpeft.parts.base import Hook, Placement
from mmpeft.sites import Selector, Site


def _apart(method: VPT, chosen: Sequence[Site], available: Sequence[Site]) -> Site | None:
    """The first chosen block of a tower, if shallow tokens would have to leap over blocks."""
    for span in [] if method.deep else _spans(chosen):
        if [s.depth for s in span] != list(range(span[0].depth, span[-1].depth + 1)):
            return span[0]
    return None


def _spans(chosen: Sequence[Site]) -> list[list[Site]]:
    """The chosen blocks by tower."""
    return [[s for s in chosen if s.tower == tower] for tower in dict.fromkeys(site.tower for site in chosen)]


@register("https://arxiv.org/abs/2203.12119", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class VPT(Sited):
    """`p` learned tokens behind the class token: at the first block (shallow) or anew at every block (deep).

    Drawn from U(±√(6 / (3 s² + d))), `s` the patch size and `d` the width; stripped at the exit, so pooling and
    the head see the tokens they know. Parameters: `p d`, deep `p d L`.
    """

    at: Selector = "tokens"
    tokens: int = 10
    deep: bool = False
    dropout: float = 0.0

    refuses: ClassVar[tuple[Refusal, ...]] = (
        Refusal(_apart, "shallow tokens go from block to block: select consecutive depths, or deep=True"),
    )

    def __post_init__(self) -> None:
        positive(self, tokens=self.tokens)
        rate(self, dropout=self.dropout)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        fans = [own_weight(model, s)[0].numel() for s in available if s.role == "embed" and s.kind == "conv"]
        chosen = self.chosen(available)
        spans = [[site] for site in chosen] if self.deep else _spans(chosen)
        return Placed([self._one(model, span, fans[0] if fans else span[0].width) for span in spans])

    def _one(self, model: nn.Module, span: list[Site], fan_in: int) -> Placement:
        first, last = span[0], span[-1]
        bound = math.sqrt(6 / (fan_in + first.width))
        part = Context(self.tokens, first.width, first.prefix, bound, any_tensor(model, first), self.dropout)
        readers = tuple(Hook(s.prefix_reader, "read", "num_prefix_tokens") for s in span if s.prefix_reader)
        hooks = (Hook(first.path, "enter"), Hook(last.path, "exit"), *readers)
        return Placement(part, first.path, "vpt", hooks, first.role)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        chosen = self.chosen(available)
        if not self.deep:
            chosen = list({site.tower: site for site in reversed(chosen)}.values())
        return sum(self.tokens * site.width for site in chosen)
