"""The last blocks of an image tower run anew, with more tokens and an attention bias."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.sites import sites


def heads(model: nn.Module) -> int:
    """Attention heads of the image tower, by its anatomy.

    Raises:
        Refused: its attention has no keys and values that could be told apart.
    """
    found = [s.heads for s in sites(model) if s.tower == "image" and s.role == "kv"]
    if not found or not found[-1]:
        raise Refused(f"the image tower of {type(model).__name__} has no attention that a bias could steer")
    return found[-1]


def through(blocks: Sequence[nn.Module], x: Tensor, mask: Tensor) -> Tensor:
    """Tokens [B, N, d] through blocks under an additive mask [B, heads, N, N].

    timm takes the mask as it is; `nn.MultiheadAttention` in open_clip's blocks has batch and heads in one dimension.
    """
    for block in blocks:
        apart = hasattr(block, "norm1")
        x = block(x, attn_mask=(mask if apart else mask.flatten(0, 1)).to(x.dtype))
    return x
