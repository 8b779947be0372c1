"""Time series, trajectories and whatever else is neither text, sound nor picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmpeft.llm.inputs.request import ROWS, TOKENS, Request
from mmpeft.types import Kwargs

_STEPS = 6


def _past(request: Request) -> dict[str, Tensor]:
    """A past as long as the context and its lags, and the future that a decoder is taught with."""
    config = request.config
    channels = int(getattr(config, "num_input_channels", 0) or 0)
    lags = list(getattr(config, "lags_sequence", None) or [0])
    length = int(config.context_length) + max(lags)
    ahead = int(getattr(config, "prediction_length", None) or 1)
    wide = (channels,) if channels else ()
    static = int(getattr(config, "num_static_categorical_features", 0) or 0)
    clock = int(getattr(config, "num_time_features", 0) or 0)
    values = request.noise(ROWS, length, *wide)
    made = {"past_values": values, "past_observed_mask": torch.ones_like(values)}
    if "past_time_features" in request.names:
        made["past_time_features"] = request.noise(ROWS, length, clock)
        made["future_values"] = request.noise(ROWS, ahead, *wide)
        made["future_time_features"] = request.noise(ROWS, ahead, clock)
    if static:
        made["static_categorical_features"] = torch.zeros(ROWS, static, dtype=torch.long)
    if "past_values_padding" in request.names:
        made["past_values_padding"] = torch.zeros(ROWS, length)
    if "freq" in request.names:
        made["freq"] = torch.zeros(ROWS, 1, dtype=torch.long)
    return made


def _trajectory(request: Request) -> dict[str, Tensor]:
    config = request.config
    return {
        "states": request.noise(ROWS, _STEPS, config.state_dim),
        "actions": request.noise(ROWS, _STEPS, config.act_dim),
        "rewards": request.noise(ROWS, _STEPS, 1),
        "returns_to_go": request.noise(ROWS, _STEPS, 1),
        "timesteps": torch.arange(_STEPS).repeat(ROWS, 1),
        "attention_mask": torch.ones(ROWS, _STEPS),
    }


def _hidden(request: Request) -> Tensor:
    return request.noise(ROWS, TOKENS, int(request.find("hidden_size", "d_model", "embed_dim")))


def _context(request: Request) -> Tensor:
    """States of several layers of the model that a small one assists, side by side."""
    return _hidden(request).repeat(1, 1, len(request.find("target_layer_ids", default=[0])))


def _shared(request: Request) -> Kwargs:
    """Keys and values of the model that a small one assists, and its last state beside its embedding."""
    shared = {}
    for module in request.model.modules():
        kind, width = getattr(module, "layer_type", None), getattr(module, "head_dim", None)
        if isinstance(kind, str) and isinstance(width, int):
            heads = int(request.find("num_attention_heads")) // int(getattr(module, "num_key_value_groups", 1))
            shared[kind] = (request.noise(ROWS, heads, TOKENS, width), request.noise(ROWS, heads, TOKENS, width))
    wide = 2 * int(request.config.backbone_hidden_size)
    return {"shared_kv_states": shared, "inputs_embeds": request.noise(ROWS, 1, wide)}


def _questions(request: Request) -> dict[str, Tensor]:
    """Two questions of two options each, in one prompt."""
    marks = torch.tensor([[TOKENS // 2, TOKENS]])
    return {"marks": marks, "num_options": torch.full((1, 2), 2), "question_type_ids": torch.tensor([[0, 1]])}


def _if_required(name: str, maker: Callable[[Request], object]) -> Callable[[Request], object]:
    return lambda request: maker(request) if name in request.required or request.main == name else None


def _visual_features(request: Request) -> dict[str, Tensor]:
    wide = int(request.find("visual_feat_dim"))
    return {"visual_feats": request.noise(ROWS, _STEPS, wide), "visual_pos": torch.rand(ROWS, _STEPS, 4)}


SERIES: dict[str, Callable[[Request], object]] = {
    "past_values": _past,
    "states": _trajectory,
    "visual_feats": _visual_features,
    "context_hidden_states": _context,
    "marks": _questions,
    "shared_kv_states": _shared,
    "state": _if_required("state", lambda request: request.noise(ROWS, int(request.find("max_state_dim", default=8)))),
    "latents": _if_required("latents", lambda request: _hidden(request).transpose(1, 2)),
    **{name: _if_required(name, _hidden) for name in ("inputs_embeds", "query_embeds", "noise_embeds")},
}
