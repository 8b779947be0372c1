"""Features of the blocks of a pair's towers, and the way of single tokens into the joint space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmpeft.errors import Refused
from mmpeft.sites.builder import is_a
from mmpeft.tasks.taps import Taps
from mmpeft.types import AnyModule


def image_taps(model: AnyModule) -> Taps:
    """The blocks of a pair's image tower."""
    return Taps(model, "image", model.encode_image)


def text_taps(model: AnyModule) -> Taps:
    """The blocks of a pair's text tower."""
    return Taps(model, "text", model.encode_text, patches=False)


def projection(model: AnyModule) -> Callable[[Tensor], Tensor]:
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
        f"single tokens of {type(visual).__name__} are not in the joint space: SAN needs a tower that pools a class "
        "token or a mean; CLIPSegDecoder works with this one"
    )
