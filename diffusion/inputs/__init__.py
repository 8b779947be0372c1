"""What diffusers' denoisers take: a small batch for any of them, read off `forward`'s parameters and the configuration.

A parameter's name says what it is across diffusers (`hidden_states`, `timestep`, `pooled_projections`), the
configuration how wide; what only one class asks for is in `input_images`, `input_videos` and `input_sounds`. The
library is never imported.
"""

from __future__ import annotations

from torch import nn

from mmpeft.diffusion.inputs.facts import Denoiser
from mmpeft.diffusion.inputs.images import CASES as IMAGES
from mmpeft.diffusion.inputs.rules import RULES
from mmpeft.diffusion.inputs.sounds import CASES as SOUNDS
from mmpeft.diffusion.inputs.videos import CASES as VIDEOS
from mmpeft.types import Args, Kwargs

CASES = {**IMAGES, **VIDEOS, **SOUNDS}

Inputs = tuple[Args, Kwargs]


def example_inputs(model: nn.Module) -> Inputs | None:
    """Two rows that a diffusers model takes, on the CPU; None for any other module, and for parts without a config."""
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.split(".")[0] == "diffusers"]
    if not names or getattr(model, "config", None) is None:
        return None
    denoiser = Denoiser(model, names)
    values: Kwargs = {}
    for parameter in denoiser.parameters:
        if parameter in RULES:
            value = RULES[parameter](denoiser)
            if value is not None:
                values[parameter] = value
    for name in names:
        if name in CASES:
            values.update(CASES[name](denoiser))
            break
    return (), {name: value for name, value in values.items() if value is not None}
