"""KronA: Kronecker-factored updates, of full rank for few parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mmpeft.errors import Refused
from mmpeft.methods.base import register
from mmpeft.methods.recipe import any_tensor, home_of, own_weight, positive, rate
from mmpeft.methods.shared.bottleneck import parallel_hooks
from mmpeft.methods.shared.kronecker import Kronecker, place_kron
from mmpeft.parts import Kron
from mmpeft.parts.base import Placement
from mmpeft.parts.branch import KronBranch, Source
from mmpeft.sites import Kind, Selector, Site


@register("https://arxiv.org/abs/2212.10650", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class KronA(Kronecker):
    """`y = W x + b + s (L ⊗ R) drop(x)`, never formed in a call. Parameters: `a c + b d` a site.

    The rank is that of L times that of R, up to full; so few parameters want a higher learning rate than LoRA's.
    """

    at: Selector = "attn.{q,v}"
    scale: float = 1.0
    dropout: float = 0.0

    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, scale=self.scale)
        rate(self, dropout=self.dropout)

    def build(self, model: nn.Module, site: Site) -> Placement:
        factor = Kron(*self.shapes(site, *self.size(model, site)), own_weight(model, site))
        return place_kron(self, "krona", model, site, factor, self.scale, self.dropout)


@register("https://arxiv.org/abs/2212.10650", "reparameterized", mergeable=False)
@dataclass(frozen=True)
class KronAB(Kronecker):
    """KronA^B: `y = F(x) + s (L ⊗ R) x` beside the feed-forward network F. Parameters: `a c + b d` a site.

    `residual="learned"` is KronA^B_res, which adds `t x` with one learned scalar t that starts at 0.
    """

    at: Selector = "mlp"
    elsewhere: ClassVar[tuple[str, ...]] = ()
    scale: float = 1.0
    residual: Literal["none", "learned"] = "none"

    takes: ClassVar[tuple[Kind, ...]] = ("module",)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, scale=self.scale)

    def size(self, model: nn.Module, site: Site) -> tuple[int, int]:
        if not site.width:
            raise Refused(f"{type(self).__name__} at {site}: the anatomy gives no width for this sub-layer")
        return site.width, site.width

    def build(self, model: nn.Module, site: Site) -> Placement:
        hooks = parallel_hooks(site)
        like = any_tensor(model, site)
        factor = Kron(*self.shapes(site, *self.size(model, site)), like)
        source: Source = "tap" if len(hooks) > 1 else "input"
        part = KronBranch(factor, like, source, self.scale, self.residual == "learned", site.channel_dim)
        return Placement(part, home_of(model, hooks[-1].path), f"kronab_{site.label}", hooks, site.role)

    def count_at(self, model: nn.Module, site: Site) -> int:
        return super().count_at(model, site) + (self.residual == "learned")
