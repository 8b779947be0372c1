"""Elementwise and bottleneck maths of adapters, scalings and prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def bottleneck(
    x: Float[Tensor, "*batch d"],
    down: Float[Tensor, "r d"],
    down_bias: Float[Tensor, " r"] | None,
    up: Float[Tensor, "d r"],
    up_bias: Float[Tensor, " d"] | None,
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Float[Tensor, "*batch d"]:
    """`U drop(σ(D x + b_d)) + b_u` (Houlsby et al. 2019, arXiv:1902.00751)."""
    hidden = activation(F.linear(x, down, down_bias))
    if dropout:
        hidden = F.dropout(hidden, dropout)
    return F.linear(hidden, up, up_bias)


def stochastic_depth(x: Float[Tensor, "b ..."], rate: float) -> Float[Tensor, "b ..."]:
    """Zero whole samples with probability `rate`, scale the rest by `1/(1-rate)` (arXiv:1603.09382)."""
    keep = torch.empty(x.shape[0], *[1] * (x.dim() - 1), device=x.device, dtype=x.dtype)
    return x * keep.bernoulli_(1 - rate).div_(1 - rate)


def along(vector: Float[Tensor, " c"], ndim: int, channel_dim: int) -> Float[Tensor, ...]:
    """View a channel vector so that it broadcasts over a tensor of `ndim` dimensions at `channel_dim`."""
    if channel_dim in (-1, ndim - 1):
        return vector
    return vector.view([-1 if d == channel_dim % ndim else 1 for d in range(ndim)])


def insert_tokens(x: Float[Tensor, "b n d"], tokens: Float[Tensor, "p d"], position: int) -> Float[Tensor, "b m d"]:
    """Insert `p` tokens after the first `position` tokens of every sequence (`m = n + p`)."""
    return torch.cat([x[:, :position], tokens.expand(len(x), -1, -1), x[:, position:]], dim=1)


def strip_tokens(x: Float[Tensor, "b m d"], count: int, position: int) -> Float[Tensor, "b n d"]:
    """Undo `insert_tokens`."""
    return torch.cat([x[:, :position], x[:, position + count :]], dim=1)
