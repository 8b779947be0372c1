"""Tiny models of every family of backbones, one file a library."""

from __future__ import annotations

from collections.abc import Callable

from tests.matrix.example import Example
from tests.matrix.families import diffusers, lot, open_clip, quantized, timm, transformers

LIBRARIES: dict[str, dict[str, Callable[[], Example]]] = {
    "timm": timm.FAMILIES,
    "open_clip": open_clip.FAMILIES,
    "diffusers": diffusers.FAMILIES,
    "transformers": transformers.FAMILIES,
    "quantised Llama": quantized.FAMILIES,
    "random sample of the zoo": lot.FAMILIES,
}
FAMILIES: dict[str, Callable[[], Example]] = {
    name: build for families in LIBRARIES.values() for name, build in families.items()
}
