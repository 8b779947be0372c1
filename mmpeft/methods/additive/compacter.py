"""Compacter and Compacter++: bottleneck adapters made of parameterised hypercomplex linears."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.methods.base import register
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import any_tensor, positive
from mmpeft.methods.shared.bottleneck import Bottleneck
from mmpeft.parts.factors import PHMBank, PHMLinear
from mmpeft.parts.shared import Shared
from mmpeft.sites import Selector, Site


@register("https://arxiv.org/abs/2106.04647", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class Compacter(Bottleneck):
    """`h ← h + U gelu(D h)` behind attention and feed-forward, `D` and `U` each `Σ_k A_k ⊗ (s_k t_kᵀ)` with n terms.

    `A` [n, n, n] is one tensor for the whole model. `n` must divide width and bottleneck. The reference also trains the
    norms: `Compacter() + NormTuning()`. Parameters: `n³`, and `3 (d + r)` a site.
    """

    n: int = 4
    reduction: int = 32
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, n=self.n)
        if self.bottleneck is not None and self.bottleneck % self.n:
            raise ConfigError(f"{type(self).__name__}: n={self.n} does not divide bottleneck={self.bottleneck}")

    def size(self, site: Site) -> int:
        """A multiple of n: the reduced width, rounded down to one but not to nothing."""
        return self.bottleneck or max(self.n, site.width // self.reduction // self.n * self.n)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        chosen = self.chosen(available)
        bank = Shared(PHMBank(self.n, any_tensor(model, chosen[0])))

        def linears(site: Site, like: Tensor) -> tuple[nn.Module, nn.Module]:
            if site.width % self.n:
                raise Refused(f"{type(self).__name__} at {site}: n={self.n} does not divide its width {site.width}")
            d, r = site.width, self.size(site)
            return PHMLinear(d, r, self.n, bank.view(), like), PHMLinear(r, d, self.n, bank.view(), like)

        placed = [self.build(model, site, linears) for site in chosen]
        return Placed([bank.placed(f"{type(self).__name__.lower()}_bank"), *placed])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return self.n**3 + super().count(model, available)

    def count_at(self, model: nn.Module, site: Site) -> int:
        return 3 * (site.width + self.size(site))


@register("https://arxiv.org/abs/2106.04647", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class CompacterPlus(Compacter):
    """Compacter++: the same behind the feed-forward network alone."""

    at: Selector = "mlp"
