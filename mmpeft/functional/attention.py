"""Attention with further keys in front: what becomes of its mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor


def prefix_mask(
    mask: Shaped[Tensor, "... n m"] | None, causal: bool, count: int, rows: int, length: int, device: torch.device
) -> Tensor | None:
    """The mask [..., n, p + m] under which all of `rows` queries see `count` keys in front of `length` others.

    The new columns are `True` in a mask of booleans and 0 in one of scores. `causal` is that of
    `scaled_dot_product_attention`: query i sees the keys up to i.
    """
    if causal:
        mask = torch.ones(rows, length, dtype=torch.bool, device=device).tril()
    if mask is None or not count:
        return mask
    mask = mask.expand(*mask.shape[:-1], length)  # one column for all keys is not one for those in front
    return F.pad(mask, (count, 0), value=mask.dtype == torch.bool)
