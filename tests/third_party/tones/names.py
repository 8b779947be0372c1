"""Tone networks by name."""

from typing import Any

import torch
from torch import nn

from tones.network import ToneNet

WIDTHS = {"tonenet_small": 16, "tonenet_large": 32}


def knows(name: str) -> bool:
    return name in WIDTHS


def names() -> list[str]:
    return list(WIDTHS)


def build(name: str) -> tuple[nn.Module, Any]:
    return ToneNet(4, WIDTHS[name]), torch.zeros(2, 64)
