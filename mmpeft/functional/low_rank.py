"""Low-rank updates of a weight: LoRA's product and DoRA's renormalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def low_rank_apply(
    x: Float[Tensor, "*batch i"], down: Float[Tensor, "r i"], up: Float[Tensor, "o r"], scale: float
) -> Float[Tensor, "*batch o"]:
    """`s · B A x`, without forming `BA` (Hu et al. 2021, arXiv:2106.09685)."""
    return F.linear(F.linear(x, down), up) * scale


def low_rank_delta(down: Float[Tensor, "r i"], up: Float[Tensor, "o r"], scale: float) -> Float[Tensor, "o i"]:
    """`ΔW = s · B A`."""
    return (up @ down) * scale


def squared_row_norms(weight: Float[Tensor, "*stack o i"]) -> Float[Tensor, "*stack o"]:
    """`‖W_j‖²` for each output row j of a matrix or of each in a stack, in fp32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=wide)
    return norms.square()


def low_rank_row_norms(
    weight: Float[Tensor, "*stack o i"],
    weight_sq: Float[Tensor, "*stack o"],
    down: Float[Tensor, "*pairs r i"],
    up: Float[Tensor, "*pairs o r"],
    scale: float,
) -> Float[Tensor, "*stack o"]:
    """`‖W + sBA‖` for each row of a matrix or of each in a stack, from `W Aᵀ` and `A Aᵀ` alone.

    `‖W‖² + 2s (B ⊙ W Aᵀ)·1 + s² (B (A Aᵀ) ⊙ B)·1`: temporaries are [o, r] and [r, r], never [o, i].
    With `B = 0` the result is exactly `sqrt(weight_sq)`. Not differentiable by design: DoRA stops the
    gradient at the norm (Liu et al. 2024, arXiv:2402.09353, section 4.3).
    """
    with torch.no_grad():
        wide = torch.promote_types(weight.dtype, torch.float32)
        down, up = down.to(wide), up.to(wide)
        cross = (up * (weight.to(wide) @ down.mT)).sum(dim=-1)
        square = ((up @ (down @ down.mT)) * up).sum(dim=-1)
        return (weight_sq.to(wide) + 2 * scale * cross + scale**2 * square).clamp_min(1e-24).sqrt()
