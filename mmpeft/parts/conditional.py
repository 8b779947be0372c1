"""`Conditional`: a frozen block that runs on the tokens a router picks, an adapter on all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.functional.soft_top_k import soft_top_k
from mmpeft.hosting.output import first_of, with_first
from mmpeft.parts.base import Part, cast
from mmpeft.parts.branch import Branch
from mmpeft.parts.factors import like_options
from mmpeft.types import Argument, Forward, Output

MASKS = ("attn_mask", "attention_mask")


class Conditional(Part):
    """`y = x + A(x) + scatter_I(λ_I ⊙ (block(x_I) - x_I))`, `λ = softtopk(w·x; k, ε)`, I its k largest.

    The `prefix` tokens in front (class token, registers) are always in I with λ = 1 and count among the
    `k = ⌈n / reduction⌉`. With `reduction` 1 there is no router, and the block runs as it is. w starts so small
    that scores spread over about ε: a wider spread saturates λ and leaves w without gradient. `shared` is a part
    whose w this one uses.
    """

    order = 2
    rowwise = False
    unmergeable = "a block that runs on some of the tokens is no change of its weights"

    def __init__(
        self,
        adapter: Branch,
        width: int,
        like: Tensor,
        *,
        prefix: int,
        reduction: float,
        epsilon: float,
        shared: Conditional | None = None,
    ) -> None:
        super().__init__()
        self.adapter, self.prefix, self.reduction, self.epsilon = adapter, prefix, reduction, epsilon
        self._shared = (shared,)  # a tuple: the other part stays registered under its own host only
        self.router: nn.Parameter | None = None
        if reduction > 1 and shared is None:
            start = torch.empty(width, **like_options(like))
            self.router = nn.Parameter(start.normal_(std=epsilon * width**-0.5))

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop(next(iter(kwargs)))
        left = max(1, -(-x.shape[1] // self.reduction) - self.prefix)
        if self.reduction == 1 or left >= x.shape[1] - self.prefix:
            output = run(x, *args, **kwargs)
            return with_first(output, self.adapter.exit(host, x, first_of(output)))
        for name in MASKS:
            if kwargs.get(name) is not None:
                raise Refused(f"CoDA runs a block on some of the tokens, and this call has an {name} over all of them")
        index, weights = self._route(x, int(left))
        index = index[..., None].expand(-1, -1, x.shape[2])
        few = x.gather(1, index)
        output = run(few, *args, **kwargs)
        y = first_of(output)
        change = cast(weights, y.dtype)[..., None] * (y - few)
        spread = x.scatter_add(1, index, cast(change, x.dtype))
        return with_first(output, self.adapter.exit(host, x, spread))

    def _route(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Indices of the tokens to run, in their order, and their λ [B, p + k]; scores are fp32 under autocast too."""
        (shared,) = self._shared
        router = self.router if shared is None else shared.router
        assert router is not None
        scores = (x[:, self.prefix :].float() * router.float()).sum(-1)
        weights = soft_top_k(scores, k, self.epsilon)
        index = scores.topk(k, dim=-1).indices.sort(dim=-1).values
        always = torch.arange(self.prefix, device=x.device).expand(len(x), -1)
        chosen = torch.cat([weights.new_ones(always.shape), weights.gather(-1, index)], dim=1)
        return torch.cat([always, index + self.prefix], dim=1), chosen
