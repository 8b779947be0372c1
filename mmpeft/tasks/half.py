"""Gradients through activations in half precision: small ones are zero there unless the loss is scaled."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from mmpeft.errors import MMPEFTWarning
from mmpeft.types import Untyped


def warn_of_half(model: nn.Module, trainer: Untyped) -> None:
    """Warn where gradients pass float16 and nothing scales the loss."""
    half = next((name for name, p in model.named_parameters() if p.dtype == torch.float16), "")
    if half and trainer is not None and getattr(trainer, "scaler", None) is None:
        warnings.warn(
            f"the base is in float16 ({half}) and nothing scales the loss: gradients below 6e-8 become 0 on their way. "
            "Hold it in bfloat16 (dtype: bfloat16), or train with --trainer.precision 16-mixed on a GPU, which scales",
            MMPEFTWarning,
            stacklevel=2,
        )
