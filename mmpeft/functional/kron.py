"""Kronecker products, applied without being formed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kron_apply(
    x: Float[Tensor, "*batch i"], left: Float[Tensor, "a c"], right: Float[Tensor, "b d"]
) -> Float[Tensor, "*batch o"]:
    """`(L ⊗ R) x` with `i = c d` and `o = a b`: `x` as a [c, d] matrix X gives `L X Rᵀ`."""
    matrix: Tensor = x.unflatten(-1, (left.shape[1], right.shape[1]))
    found: Tensor = (left @ matrix @ right.T).flatten(-2)
    return found


def kron_sum(
    left: Float[Tensor, "n a c"], rows: Float[Tensor, "n b"], columns: Float[Tensor, "n d"]
) -> Float[Tensor, "o i"]:
    """`Σ_k L_k ⊗ (s_k t_kᵀ)`, a parameterised hypercomplex matrix (arXiv:2106.04647); o = a b, i = c d."""
    return torch.einsum("kac,kb,kd->abcd", left, rows, columns).flatten(2).flatten(0, 1)


def balanced_factor(size: int) -> int:
    """The divisor of `size` nearest to its square root from below."""
    return max(d for d in range(1, int(size**0.5) + 1) if size % d == 0)
