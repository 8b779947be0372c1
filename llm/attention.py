"""How learned keys and values enter transformers' attention: through its own registry of attention functions.

An attention module asks its `config` which function to call. While a part is in use, the module (and no other)
sees a config that names this one, which extends keys, values and mask and calls the original.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.host import base_value, original_class, plan_of
from mmpeft.parts.gate import GatedKeys
from mmpeft.parts.prefix import GatedPrefix

NAME = "mmpeft"


class _Config:
    """A module's config that names another attention function."""

    _attn_implementation = NAME

    def __init__(self, base: Any) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def view(module: nn.Module, config: Any, part: Any) -> Any:
    """What the attention module reads as its config."""
    _register()
    return _Config(config)


@cache
def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """The module's own attention function on keys and values with every part's in front.

    `query` is [B, H, n, d], `key` and `value` [B, h, m, d] with what the cache holds.
    """
    parts = plan_of(module).reads["config"]
    function = _original(module)
    beside = [part for part in parts if isinstance(part, GatedPrefix)]
    gated = [part for part in parts if isinstance(part, GatedKeys)]

    def with_(front: list[Any]) -> tuple[Tensor, Any]:
        keys, values, mask, own = key, value, attention_mask, options
        for part in front:
            keys, values = part.extend(keys, values)
        count, length = keys.shape[2] - key.shape[2], key.shape[2]
        if count:
            mask = _extended(module, mask, query, length, count)
            if own.get("position_bias") is not None:
                own = {**own, "position_bias": F.pad(own["position_bias"], (count, 0))}
        return function(module, query, keys, values, mask, **own)  # type: ignore[no-any-return]

    front = [part for part in parts if part not in beside and part not in gated]
    output, weights = with_(front)
    for part in gated:
        output = part.interpolate(output, with_([*front, part])[0])
    for part in beside:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        output = output + part.beside(query, scaling).to(output.dtype)
    return output, weights


def _original(module: nn.Module) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = base_value(module, "config")._attn_implementation
    home = sys.modules[original_class(module).__module__]
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(home, "eager_attention_forward", None))


def _extended(module: nn.Module, mask: Any, query: Tensor, length: int, count: int) -> Any:
    """A mask that lets every query see the prefix: padding masks [B, m], score masks [B, 1, n, m], or none."""
    if isinstance(mask, Tensor):
        return F.pad(mask, (count, 0), value=1 if mask.dtype == torch.bool or mask.dim() == 2 else 0)
    if mask is not None:
        raise Refused(f"prefixes do not know masks of type {type(mask).__name__}; load the model with sdpa or eager")
    rows = query.shape[2]
    flash = "flash" in str(base_value(module, "config")._attn_implementation)
    if rows == 1 or flash or not getattr(module, "is_causal", False):
        return None
    causal = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    return F.pad(causal, (count, 0), value=True)[None, None]
