"""Hadamard products of two low-rank matrices: formed without keeping the halves, or never formed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmpeft.types import Ctx

Up = Float[Tensor, "o r"]
Down = Float[Tensor, "r i"]


class _Product(torch.autograd.Function):
    """The product saves its four factors for backward and none of the three [o, i] matrices."""

    generate_vmap_rule = True

    @staticmethod
    def forward(up: Tensor, down: Tensor, up_2: Tensor, down_2: Tensor) -> Tensor:
        return (up @ down) * (up_2 @ down_2)

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        up, down, up_2, down_2 = ctx.saved_tensors
        first, second = grads[0] * (up_2 @ down_2), grads[0] * (up @ down)
        return first @ down.T, up.T @ first, second @ down_2.T, up_2.T @ second


def hadamard_product(up: Up, down: Down, up_2: Up, down_2: Down) -> Float[Tensor, "o i"]:
    """`(B₁ A₁) ⊙ (B₂ A₂)`, of rank up to r² (Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098)."""
    found: Tensor = _Product.apply(up, down, up_2, down_2)
    return found


def khatri_rao(up: Up, down: Tensor, up_2: Up, down_2: Tensor) -> tuple[Float[Tensor, "o rr"], Tensor]:
    """The same product as one of rank r²: `(B₁ ∗ B₂)(A₁ ∗ A₂)`, row-wise and column-wise Khatri–Rao products.

    `down` is [r, i] or a kernel [r, i, k...].
    """
    rows = (up[:, :, None] * up_2[:, None]).flatten(1)
    return rows, (down[:, None] * down_2[None]).flatten(0, 1)
