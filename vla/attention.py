"""How learned keys and values enter `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.parts.attention import KeyValuePart, attend
from mmpeft.parts.prefix import GatedPrefix, Prefix
from mmpeft.types import Args, Forward, Kwargs, Output

NAMES = ("query", "key", "value", "key_padding_mask", "need_weights")


def multihead(
    host: nn.Module,
    run: Forward,
    parts: Sequence[KeyValuePart],
    args: Args,
    kwargs: Kwargs,
) -> Output:
    """The module's own forward pass with the keys and values of every part.

    A gated attention is added behind it: torch's fast path for inference, which a function mode would turn off,
    rounds otherwise than the other, and a closed gate shall change no bit.

    Raises:
        Refused: the caller asks for attention weights, whose columns would be more than the keys it gave.
    """
    assert isinstance(host, nn.MultiheadAttention)
    given = {**dict(zip(NAMES, args)), **kwargs}
    if given.get("need_weights", True):
        raise Refused(
            "nn.MultiheadAttention with learned keys has more attention weights than keys were given; "
            "call it with need_weights=False"
        )
    front = [part for part in parts if isinstance(part, Prefix)]
    output, weights = attend(host, run, front, args, kwargs) if front else run(*args, **kwargs)
    gated = [part for part in parts if isinstance(part, GatedPrefix)]
    if gated:
        queries = _queries(host, given["query"])
        for part in gated:
            beside = part.beside(queries, queries.shape[-1] ** -0.5).flatten(2)
            beside = F.linear(beside, host.out_proj.weight.to(beside.dtype))
            output = output + (beside if host.batch_first else beside.transpose(0, 1)).to(output.dtype)
    return output, weights


def _queries(host: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """[B, h, n, d]."""
    x = x if host.batch_first else x.transpose(0, 1)
    width = host.embed_dim
    weight = host.in_proj_weight[:width] if host._qkv_same_embed_dim else host.q_proj_weight
    bias = None if host.in_proj_bias is None else host.in_proj_bias[:width]
    queries: Tensor = F.linear(x, weight, bias).unflatten(-1, (host.num_heads, -1))
    return queries.transpose(1, 2)
