"""Soft top-k: weights in [0, 1] that sum to k exactly, with their implicit gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from mmpeft.types import Ctx


def soft_top_k(scores: Float[Tensor, "*batch n"], k: int, epsilon: float) -> Float[Tensor, "*batch n"]:
    """`argmax_λ sᵀλ + ε H(λ)` under `Σλ = k`, `0 ≤ λ ≤ 1`: `λ_i = min(1, exp((s_i + a) / ε))` (arXiv:2304.04947).

    `a` is solved by sorting, exactly, where the usual coordinate descent fills a part of the budget after 20 rounds.
    Computed in at least fp32. A score of `-inf` (padding) has weight 0; where at most k scores are finite, those
    have weight 1.
    """
    weights: Tensor = _SoftTopK.apply(scores, k, epsilon)
    return weights


def _solve(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """λ. With the m largest at 1, the others share k - m: `a_m = ε (ln(k - m) - LSE_{i>m}(s_i / ε))`.

    The right m is the smallest for which the largest of the others stays at or below 1.
    """
    finite = torch.isfinite(scores)
    z = scores / epsilon
    ordered = z.sort(dim=-1, descending=True).values
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)[..., :k]  # LSE of everything from place m on
    budget = torch.arange(k, 0, -1, device=z.device, dtype=z.dtype).log()
    shift = budget - rest
    fits = ordered[..., :k] + shift <= 0
    m = fits.to(torch.int8).argmax(-1, keepdim=True)
    weights = (z + shift.gather(-1, m)).exp().clamp(max=1)
    few = finite.sum(-1, keepdim=True) <= k
    return torch.where(few | ~finite, finite.to(z.dtype), weights)


class _SoftTopK(Function):
    """`∂λ_j/∂s_i = λ_j/ε (δ_ij - λ_i / Σ_U λ)` for i, j in U, the weights below 1; 0 elsewhere."""

    @staticmethod
    def forward(ctx: Ctx, scores: Tensor, k: int, epsilon: float) -> Tensor:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = _solve(wide, min(k, scores.shape[-1]), epsilon)
        ctx.save_for_backward(weights)
        ctx.epsilon, ctx.dtype = epsilon, scores.dtype
        return weights

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        below = torch.where(weights < 1, weights, 0.0)
        total = below.sum(-1, keepdim=True).clamp(min=torch.finfo(below.dtype).tiny)
        mean = (grad * below).sum(-1, keepdim=True) / total
        return (below / ctx.epsilon * (grad - mean)).to(ctx.dtype), None, None
