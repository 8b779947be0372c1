"""The last blocks of an image tower run anew, with more tokens and an attention bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.anatomy import is_a
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


def through(blocks: Sequence[Any], x: Tensor, mask: Tensor) -> Tensor:
    """Tokens [B, N, d] through blocks under an additive mask [B, heads, N, N].

    timm takes the mask as it is; `nn.MultiheadAttention` in open_clip's blocks has batch and heads in one dimension.
    """
    for block in blocks:
        apart = hasattr(block, "norm1")
        x = block(x, attn_mask=(mask if apart else mask.flatten(0, 1)).to(x.dtype))
    return x


def projection(model: Any) -> Callable[[Tensor], Tensor]:
    """What takes a token [.., d] of the last block into the joint space, as the tower does with what it pools.

    Raises:
        Refused: the tower pools by attention, or is none with tokens.
    """
    visual = model.visual
    if (
        is_a(visual, "TimmModel")
        and getattr(visual.trunk, "attn_pool", None) is None
        and hasattr(visual.trunk, "blocks")
    ):
        return lambda x: visual.head(visual.trunk.fc_norm(visual.trunk.norm(x)))
    if is_a(visual, "VisionTransformer") and visual.attn_pool is None:
        return lambda x: visual.ln_post(x) if visual.proj is None else torch.matmul(visual.ln_post(x), visual.proj)
    raise Refused(
        f"SAN needs an image tower that pools a class token or a mean; {type(visual).__name__} does not; "
        "CLIPSegDecoder works with it"
    )
