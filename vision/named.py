"""timm's and torchvision's models by name, without weights."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn

from mmpeft.embedded.store import read_card
from mmpeft.vision.backbone import check_name, create, embedded_names


def knows(name: str) -> bool:
    """A name of timm's registry, with or without a tag, a folder or file of timm's layout, or an embedded backbone."""
    if name.startswith("embedded:"):
        return name.removeprefix("embedded:") in embedded_names()
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        return True
    card = path / "config.json"
    return "architecture" in read_card(card) if card.is_file() else timm.is_model(name)


def names() -> list[str]:
    """timm's registry and what ships with the suite."""
    return [*timm.list_models(), *(f"embedded:{name}" for name in embedded_names())]


def build(name: str) -> nn.Module:
    """The architecture with the head it comes with."""
    if name.startswith("embedded:") or Path(name).expanduser().exists():
        return create(name, pretrained=False)
    if not name.startswith(("hf-hub:", "hf_hub:")):
        check_name(name)
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model
