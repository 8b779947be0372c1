"""Data modules of image tasks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {"EmojiData": "emoji", "DigitsData": "digits", "FolderData": "folder", "HubData": "hub", "VTABData": "vtab"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmpeft.vision.data' has no attribute {name!r}")
    return getattr(import_module(f"mmpeft.vision.data.{_HOME[name]}"), name)
