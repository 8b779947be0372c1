"""Small inputs that a transformers model accepts, from its signature, its config and the shapes of its first weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.llm.pixel_inputs import PIXELS
from mmpeft.llm.request import Request
from mmpeft.llm.sound_inputs import SOUNDS
from mmpeft.llm.text_inputs import TEXTS, place_features

_BASE = "transformers.modeling_utils.PreTrainedModel"


def example_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments for one pass of two rows on the CPU, or None if this is no transformers model."""
    if not any(f"{c.__module__}.{c.__qualname__}" == _BASE for c in type(model).__mro__):
        return None
    request = Request(model, inspect.signature(model.forward).parameters)
    makers: dict[str, Callable[[Request], Any]] = {**TEXTS, **SOUNDS, **PIXELS}
    made: dict[str, Any] = {}
    for name in request.names:
        if name in makers:
            value = makers[name](request)
            if isinstance(value, dict):
                made.update({k: v for k, v in value.items() if k in request.names})
            elif value is not None:
                made.setdefault(name, value)
    place_features(request, made)
    return (), {name: _as_model(model, value) for name, value in made.items()}


def _as_model(model: nn.Module, value: Any) -> Any:
    """Numbers in the precision of the weights."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if isinstance(value, Tensor) and value.is_floating_point() and kind in (torch.float16, torch.bfloat16):
        return value.to(kind)
    return value
