"""LLaMA-Adapter: gated prompts beside the attention of the last layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.functional.rows import take_rows
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at
from mmpeft.methods.additive.prefix_tuning import entry
from mmpeft.methods.base import Sited, register
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import any_tensor, fan, positive
from mmpeft.parts import GatedPrefix
from mmpeft.parts.attention import connection
from mmpeft.parts.base import Placement, cast
from mmpeft.sites import Selector, Site


@dataclass(frozen=True)
class _Projection:
    """A frozen projection of the layer, its own rows alone; refers to modules and owns nothing.

    `home` is the module that holds the bias, under the name `bias`.
    """

    module: nn.Module
    site: Site
    home: nn.Module
    bias: str

    @classmethod
    def of(cls, model: nn.Module, site: Site) -> _Projection:
        home, _, bias = (site.bias or f"{site.path}.bias").rpartition(".")
        return cls(module_at(model, site.path), site, module_at(model, home), bias)

    def __call__(self, x: Tensor) -> Tensor:
        weight = base_value(self.module, self.site.tensor)
        weight = take_rows(weight.t() if self.site.transposed else weight, self.site.rows)
        bias = self.home._parameters.get(self.bias, self.home._buffers.get(self.bias))
        if bias is not None and len(bias) != len(weight):  # of a fused projection; else it is that of keys alone
            bias = take_rows(bias, self.site.rows)
        return F.linear(x, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype))


@register("https://arxiv.org/abs/2303.16199", "additive", mergeable=False)
@dataclass(frozen=True)
class LLaMAAdapter(Sited):
    """`attention(x) + tanh(g) softmax(q K_pᵀ/√d) V_p` in the last `layers` layers, g starting at 0.

    `K_p` and `V_p` are the layer's own projections of `p` learned tokens. Parameters: `p d + 1` a layer.
    """

    at: Selector = "kv"
    tokens: int = 10
    layers: int = 30

    def __post_init__(self) -> None:
        positive(self, tokens=self.tokens, layers=self.layers)

    def check(self, model: nn.Module, available: list[Site]) -> None:
        self.last(available)

    def last(self, available: list[Site]) -> list[tuple[Site, Site, Site]]:
        """The last chosen `kv` sites of each tower, with the projections of their keys and values."""
        chosen = self.chosen(available)
        depths = {site.tower: max(s.depth for s in chosen if s.tower == site.tower) for site in chosen}
        found = []
        for site in chosen:
            if site.depth > depths[site.tower] - self.layers:
                near = [s for s in available if s.depth == site.depth and s.tower == site.tower]
                inside = [s for s in near if f"{s.path}.".startswith(f"{site.path}.")]
                own = [s for s in inside if s.role.endswith((".k", ".v"))]
                if len(own) > 2:  # attention over two streams: the tokens are in that of `attn`
                    own = [s for s in own if s.role.startswith("attn.")]
                if len(own) != 2:
                    raise Refused(f"LLaMAAdapter at {site}: the anatomy names no projections of its keys and values")
                if own[0].refuse:
                    raise Refused(f"LLaMAAdapter at {site}: of its keys, {own[0].refuse}")
                keys, values = sorted(own, key=lambda s: s.role)
                found.append((site, keys, values))
        return found

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements = []
        for site, keys, values in self.last(available):
            project = tuple(_Projection.of(model, s) for s in (keys, values))
            width = fan(model, keys)[1]
            part = GatedPrefix(self.tokens, width, site.width, project, any_tensor(model, site), connection(site).view)
            hook = entry(site.path, connection(site))
            placements.append(Placement(part, site.path, "llamaadapter", (hook,), site.role))
        return Placed(placements)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(self.tokens * fan(model, keys)[1] + 1 for _, keys, _ in self.last(available))
