"""torchvision's models by name, without weights. Many of its names are timm's too, so that a prefix is asked for."""

from __future__ import annotations

from torch import nn

from mmpeft.errors import ConfigError, nearest


def knows(name: str) -> bool:
    """None without the prefix."""
    return False


def names() -> list[str]:
    """None that the name alone would find."""
    return []


def build(name: str) -> nn.Module:
    """A model of torchvision's registry."""
    from torchvision.models import get_model, list_models

    known = list_models()
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}.{nearest(name, known)}")
    options = {"weights": None} | ({"weights_backbone": None} if name in _with_backbone() else {})
    model: nn.Module = get_model(name, **options)
    return model


def _with_backbone() -> set[str]:
    """Models that would fetch the weights of their backbone."""
    from torchvision import models

    return {*models.list_models(models.detection), *models.list_models(models.segmentation)}
