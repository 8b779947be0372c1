"""Small random models of every type that transformers has."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

from tests.zoo.shrink import small_config

# The most complete class first. Where a type has both, a masked model is what its config describes.
_HEADS = [
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
]


def _mappings() -> list[dict[str, Any]]:
    tables = {n: getattr(modeling_auto, n) for n in dir(modeling_auto) if n.endswith("MAPPING_NAMES")}
    del tables["CONFIG_MAPPING_NAMES"]
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS] + ["MODEL_MAPPING_NAMES"]
    return [tables[n] for n in [*first, *(n for n in tables if n not in first)]]


def names() -> list[str]:
    """What the check of the zoo runs."""
    return types()


def types() -> list[str]:
    """Every model type that an automatic class can create."""
    tables = _mappings()
    return sorted(t for t in configuration_auto.CONFIG_MAPPING_NAMES if any(t in table for table in tables))


def model_class(model_type: str) -> type[nn.Module]:
    """The most complete class of a type: one that takes its config as it is."""
    config = configuration_auto.CONFIG_MAPPING[model_type]
    found: list[type[nn.Module]] = []
    for table in _mappings():
        if model_type in table:
            called = [table[model_type]] if isinstance(table[model_type], str) else table[model_type]
            found += [getattr(transformers, name) for name in called]
    return next((c for c in found if issubclass(config, getattr(c, "config_class", None) or object)), found[0])


def build(model_type: str) -> nn.Module:
    """A small random model; raises with the reason where a type needs files or packages that are not there."""
    config = small_config(configuration_auto.CONFIG_MAPPING[model_type])
    kind = model_class(model_type)
    if kind.forward.__qualname__ == "_forward_unimplemented":
        raise TypeError(f"{kind.__name__} has no forward pass: its parts are called one by one")
    torch.manual_seed(0)
    return kind(config).eval()
