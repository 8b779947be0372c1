"""Data modules of text-to-image tuning."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {"CaptionedImages": "images", "EmojiStyle": "emoji"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmpeft.diffusion.data' has no attribute {name!r}")
    return getattr(import_module(f"mmpeft.diffusion.data.{_HOME[name]}"), name)
