"""Vision backbones and tasks through timm and torchvision.

Importing this package registers the anatomies and loads neither library; other names load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmpeft.sites.named import Library, add_library
from mmpeft.vision import anatomy  # noqa: F401 - registers the anatomies

add_library(Library("timm", "mmpeft.vision.named", domain="vision"))
add_library(Library("torchvision", "mmpeft.vision.named_torchvision", domain="vision"))

_HOME = {
    "create": "backbone",
    "normalisation": "backbone",
    "ImageClassifier": "classification.task",
    "EmojiData": "data",
    "DigitsData": "data",
    "FolderData": "data",
    "HubData": "data",
    "VTABData": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmpeft.vision' has no attribute {name!r}")
    return getattr(import_module(f"mmpeft.vision.{_HOME[name]}"), name)
