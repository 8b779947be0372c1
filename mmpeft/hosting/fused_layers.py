"""Layers of torch that, in evaluation, read the weights of the modules inside them and call none of these.

While parts hang under one, it says of itself that its activation is none that the fused kernel knows.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mmpeft.hosting.modules import module_at

FLAG = "activation_relu_or_gelu"


def open_layers(model: nn.Module, paths: Iterable[str], kept: dict[str, int]) -> None:
    """Have every fused layer around some modules call what is inside it; `kept` gets what it said before."""
    for path in paths:
        while path:
            path = path.rpartition(".")[0]
            layer = module_at(model, path)
            if isinstance(layer, nn.TransformerEncoderLayer) and path not in kept:
                kept[path] = layer.__dict__[FLAG]
                layer.__dict__[FLAG] = 0


def close_layers(model: nn.Module, kept: dict[str, int]) -> None:
    """Let them take their fused path again."""
    for path, flag in kept.items():
        module_at(model, path).__dict__[FLAG] = flag
    kept.clear()
