"""Tiny models of every family of backbones, one file a library."""

from __future__ import annotations

from collections.abc import Callable

from tests.matrix.example import Example
from tests.matrix.families import timm, transformers

FAMILIES: dict[str, Callable[[], Example]] = {**timm.FAMILIES, **transformers.FAMILIES}
