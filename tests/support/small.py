"""Small random models of transformers' types, with settings of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmpeft.sites import inputs_of
from tests.zoo import hf


def small(kind: str, **settings: Any) -> nn.Module:
    """A small model of a type whose config is changed before it is built."""
    config = hf.small_config(hf.configuration_auto.CONFIG_MAPPING[kind])
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return hf.model_class(kind)(config).eval()


def batch_of(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs that the model's library is known to take.

    Raises:
        ValueError: it is known of none.
    """
    given = inputs_of(model)
    if given is None:
        raise ValueError(f"nothing is known of the inputs of {type(model).__name__}")
    return given
