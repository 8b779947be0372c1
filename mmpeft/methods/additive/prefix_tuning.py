"""Prefix tuning and P-tuning v2: learned keys and values in every attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from mmpeft.methods.base import Method, Sited, register
from mmpeft.methods.placed import Placed, Tensors
from mmpeft.methods.recipe import any_tensor, positive
from mmpeft.parts.attention import connection
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.prefix import Prefix, PrefixMLP
from mmpeft.sites import Connect, Selector, Site


def entry(path: str, connect: Connect) -> Hook:
    """How keys and values enter the attention at `path`."""
    return Hook(path, "read", connect.attribute) if connect.attribute else Hook(path, "around")


@dataclass(frozen=True)
class KeyValues(Sited):
    """`tokens` learned keys and values in front of every attention's own, each layer apart."""

    at: Selector = "kv"
    tokens: int = 10

    def __post_init__(self) -> None:
        positive(self, tokens=self.tokens)

    def sizes(self, chosen: list[Site]) -> list[int]:
        """Features of keys and values together, by layer."""
        return [2 * site.heads * site.width for site in chosen]

    def generator(self, model: nn.Module, chosen: list[Site]) -> PrefixMLP | None:
        """What generates the prefixes while training; None where they are trained themselves."""
        return None

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        chosen = self.chosen(available)
        mlp = self.generator(model, chosen)
        placements = []
        for i, site in enumerate(chosen):
            source = (mlp, i) if mlp is not None else None
            like = any_tensor(model, site)
            part = Prefix(self.tokens, site.heads, site.width, like, connection(site).view, source)
            hook = entry(site.path, connection(site))
            placements.append(Placement(part, site.path, type(self).__name__.lower(), (hook,), site.role))
        return Placed(placements)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return self.tokens * sum(self.sizes(self.chosen(available)))


@register("https://arxiv.org/abs/2110.07602", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class PTuningV2(KeyValues):
    """P-tuning v2: `p` keys and values a layer, trained as they are. Parameters: `2 p h d` a layer.

    Wants a learning rate about ten times that of LoRA.
    """


@register("https://arxiv.org/abs/2101.00190", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class PrefixTuning(KeyValues):
    """`[K; V]_l = MLP(E)_l`: one embedding E [p, d] and one tanh MLP of size `hidden` generate all layers' prefixes.

    The MLP steadies training and is dropped by `tuning.for_inference()`, which keeps the generated keys and values;
    `hidden=0` trains those directly. Parameters: `p d + h (d + 1) + (h + 1) Σ 2 h_l d_l`.
    """

    tokens: int = 30
    hidden: int = 512

    def generator(self, model: nn.Module, chosen: list[Site]) -> PrefixMLP | None:
        if not self.hidden:
            return None
        width = max(site.heads * site.width for site in chosen)
        return PrefixMLP(self.tokens, width, self.hidden, self.sizes(chosen), any_tensor(model, chosen[0]))

    def count(self, model: nn.Module, available: list[Site]) -> int:
        if not self.hidden:
            return super().count(model, available)
        chosen = self.chosen(available)
        width = max(site.heads * site.width for site in chosen)
        inner = self.tokens * width + self.hidden * (width + 1)
        return inner + (self.hidden + 1) * sum(self.sizes(chosen))

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placed = super().place(model, available)
        return replace(placed, bake=partial(self._bake, placed.placements)) if self.hidden else placed

    def _bake(self, placements: Sequence[Placement]) -> tuple[Method, Tensors]:
        """The generated keys and values, without what generates them."""
        parts = [p.part for p in placements if isinstance(p.part, Prefix)]
        return replace(self, hidden=0), [{"tokens": part.keys_and_values()} for part in parts]
