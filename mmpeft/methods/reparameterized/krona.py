"""KronA: Kronecker-factored updates, of full rank for few parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.functional.kron import balanced_factor
from mmpeft.host import module_at
from mmpeft.methods.base import SiteMethod, any_tensor, fan, home_of, own_weight, positive, rate, register
from mmpeft.methods.shared.bottleneck import parallel_hooks
from mmpeft.parts import Delta, Kron
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.branch import KronBranch, Source
from mmpeft.sites import Kind, Selector, Site


@dataclass(frozen=True)
class Kronecker(SiteMethod):
    """`s L ⊗ R` with `L` [a, c] and `R` [b, d] where `a b = o` and `c d = i`; L Kaiming-uniform, R zero.

    `left` is `(a, c)`; by default the divisors nearest to `√o` and `√i` from below, which takes the fewest parameters.
    """

    left: Sequence[int] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self, scale=self.scale)
        if self.left and (len(self.left) != 2 or min(self.left) < 1):
            raise ConfigError(f"{type(self).__name__}: left is (rows, columns) of the first factor, got {self.left!r}")

    def shapes(self, site: Site, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two factors of a [rows, columns] update."""
        a, c = self.left or (balanced_factor(rows), balanced_factor(columns))
        if rows % a or columns % c:
            raise Refused(
                f"{type(self).__name__} at {site}: left=({a}, {c}) does not divide [{rows}, {columns}]; "
                "choose divisors of both, or leave left to the default"
            )
        return (a, c), (rows // a, columns // c)

    def size(self, model: nn.Module, site: Site) -> tuple[int, int]:
        """Rows and columns of the update of a site."""
        return fan(model, site)

    def count_at(self, model: nn.Module, site: Site) -> int:
        (a, c), (b, d) = self.shapes(site, *self.size(model, site))
        return a * c + b * d


@register("https://arxiv.org/abs/2212.10650", "reparameterized", mergeable=True)
@dataclass(frozen=True)
class KronA(Kronecker):
    """`y = W x + b + s (L ⊗ R) drop(x)`, never formed in a call. Parameters: `a c + b d` a site.

    The rank is that of L times that of R, up to full; so few parameters want a higher learning rate than LoRA's.
    """

    at: Selector = "attn.{q,v}"
    dropout: float = 0.0

    takes: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    def __post_init__(self) -> None:
        super().__post_init__()
        rate(self, dropout=self.dropout)

    def build(self, model: nn.Module, site: Site) -> Placement:
        weight = own_weight(model, site)
        whole = site.via == "weight" or getattr(module_at(model, site.path), "groups", 1) > 1
        if self.dropout and whole:
            raise Refused(f"KronA at {site}: the weight itself is changed, so no input can be dropped; use dropout=0")
        hook = Hook(site.path, "read", site.tensor) if whole else Hook(site.path, "exit")
        factor = Kron(*self.shapes(site, *self.size(model, site)), weight)
        part = Delta(weight, factor, self.scale, site.rows, self.dropout, transposed=site.transposed)
        return Placement(part, site.path, f"krona_{site.label}", (hook,), site.role)


@register("https://arxiv.org/abs/2212.10650", "reparameterized", mergeable=False)
@dataclass(frozen=True)
class KronAB(Kronecker):
    """KronA^B: `y = F(x) + s (L ⊗ R) x` beside the feed-forward network F. Parameters: `a c + b d` a site.

    `residual="learned"` is KronA^B_res, which adds `t x` with one learned scalar t that starts at 0.
    """

    at: Selector = "mlp"
    residual: Literal["none", "learned"] = "none"

    takes: ClassVar[tuple[Kind, ...]] = ("module",)

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
