"""Small inputs that a transformers model accepts, from its signature, its config and the shapes of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmpeft.llm.inputs.pixels import PIXELS
from mmpeft.llm.inputs.request import Request
from mmpeft.llm.inputs.series import SERIES
from mmpeft.llm.inputs.sounds import SOUNDS
from mmpeft.llm.inputs.texts import TEXTS, place_features
from mmpeft.types import Args, Config, Kwargs

_BASE = "transformers.modeling_utils.PreTrainedModel"


def example_inputs(model: nn.Module) -> tuple[Args, Kwargs] | None:
    """Arguments for one pass of two rows on the CPU, or None if this is no transformers model."""
    if not any(f"{c.__module__}.{c.__qualname__}" == _BASE for c in type(model).__mro__):
        return None
    request = Request(model)
    makers = {**TEXTS, **SOUNDS, **PIXELS, **SERIES}
    made: Kwargs = {}
    for name in request.names:
        if name in makers and name not in made:
            value = makers[name](request)
            values = value if isinstance(value, dict) else {name: value}
            made.update({k: _as_weights(model, v) for k, v in values.items() if k in request.names and v is not None})
    place_features(request, made)
    config: Config = model.config
    if getattr(config, "add_cross_attention", False) and "encoder_hidden_states" in request.names:
        made.setdefault("encoder_hidden_states", _as_weights(model, torch.rand(2, 4, config.hidden_size)))
    return (), made


def _as_weights(model: nn.Module, value: object) -> object:
    """Numbers in the precision of the weights."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if isinstance(value, dict | tuple):
        return tree_map(lambda one: _as_weights(model, one), value)
    if isinstance(value, Tensor) and value.is_floating_point() and kind in (torch.float16, torch.bfloat16):
        return value.to(kind)
    return value
