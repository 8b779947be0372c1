"""VL-Adapter: a bottleneck between two norms behind each sub-layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.methods.base import register
from mmpeft.methods.recipe import any_tensor
from mmpeft.methods.shared.bottleneck import Bottleneck, Linears
from mmpeft.parts.base import Placement, cast
from mmpeft.parts.branch import Branch
from mmpeft.parts.factors import like_options
from mmpeft.sites import Selector, Site


@register("https://arxiv.org/abs/2112.06825", "additive", mergeable=False)
@dataclass(frozen=True)
class VLAdapter(Bottleneck):
    """`h ← h + LN(U σ(D LN(h)))` behind self-attention, cross-attention and feed-forward, before the residual sums.

    One adapter serves all tasks (the paper's "Single Adapter"). The gain of the outer norm starts at 0, so that the
    model starts as it was; at 1, as usual, the branch would start as loud as the stream whatever U is. Parameters:
    `2 d r + r + 5 d` a site.
    """

    at: Selector = "{attn,cross,mlp}"
    reduction: int = 8
    activation: str = "gelu"

    def build(self, model: nn.Module, site: Site, linears: Linears | None = None) -> Placement:
        plain = super().build(model, site, linears or self._linears)
        assert isinstance(plain.part, Branch)
        return replace(plain, part=NormedBranch(plain.part, site.width, any_tensor(model, site)))

    def _linears(self, site: Site, like: Tensor) -> tuple[nn.Module, nn.Module]:
        """PyTorch's own start: the outer norm takes out the scale of U, so it must not be near 0."""
        options = like_options(like)
        size = self.size(site)
        return nn.Linear(site.width, size, **options), nn.Linear(size, site.width, **options)

    def count_at(self, model: nn.Module, site: Site) -> int:
        return super().count_at(model, site) + 4 * site.width


class NormedBranch(Branch):
    """A branch with a norm [d] before and one behind it; the gain of the latter starts at 0."""

    def __init__(self, branch: Branch, width: int, like: Tensor) -> None:
        super().__init__(
            width,
            1,
            like,
            source=branch.source,
            activation=branch.activation,
            dropout=branch.dropout,
            channel_dim=branch.channel_dim,
            linears=(branch.down, branch.up),
        )
        self.before = nn.LayerNorm(width, **like_options(like))
        self.behind = nn.LayerNorm(width, **like_options(like))
        nn.init.zeros_(self.behind.weight)

    def apply_to(self, source: Tensor) -> Tensor:
        return _norm(self.behind, super().apply_to(_norm(self.before, source)))


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    gain, shift = cast(layer.weight, x.dtype), cast(layer.bias, x.dtype)
    return F.layer_norm(x, list(layer.normalized_shape), gain, shift, layer.eps)
