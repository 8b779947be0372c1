"""Visual prompt tuning, shallow and deep."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from mmpeft.errors import Refused
from mmpeft.methods.base import Sited, any_tensor, own_weight, positive, rate, register
from mmpeft.parts import Context
from mmpeft.parts.base import Hook, Placement
from mmpeft.sites import Selector, Site


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

    def __post_init__(self) -> None:
        positive(self, tokens=self.tokens)
        rate(self, dropout=self.dropout)

    def place(self, model: nn.Module, available: list[Site]) -> list[Placement]:
        fans = [own_weight(model, s)[0].numel() for s in available if s.role == "embed" and s.kind == "conv"]
        spans = [[site] for site in self.chosen(available)]
        if not self.deep:
            towers = dict.fromkeys(span[0].tower for span in spans)
            spans = [[s for [s] in spans if s.tower == tower] for tower in towers]
        return [self._one(model, span, fans[0] if fans else span[0].width) for span in spans]

    def _one(self, model: nn.Module, span: list[Site], fan_in: int) -> Placement:
        first, last = span[0], span[-1]
        if [s.depth for s in span] != list(range(first.depth, last.depth + 1)):
            raise Refused("VPT shallow carries its tokens from block to block: select consecutive depths")
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
