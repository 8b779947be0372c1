"""Which numbers a trained tensor, and an option of a method, can be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def unfit(tensor: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """Why values read from somewhere cannot become a tensor of this type; empty where they can.

    They must be of its kind, finite, and finite still once they are cast to it.
    """
    if tensor.is_complex() or tensor.is_floating_point() != dtype.is_floating_point:
        expected = "floating-point" if dtype.is_floating_point else "whole"
        return f"holds values of type {_name(tensor.dtype)}; expected {expected} numbers"
    if not dtype.is_floating_point:
        same = torch.equal(tensor.to(dtype).to(torch.int64), tensor.to(torch.int64))
        return "" if same else f"holds numbers that {_name(dtype)} cannot hold"
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # eight bits know no `isfinite`
    if not torch.isfinite(wide).all():
        return "holds NaN or infinity; the adapter was saved from a diverged run"
    if torch.finfo(wide.dtype).max > torch.finfo(dtype).max and not torch.isfinite(wide.to(dtype)).all():
        return f"holds values up to {float(wide.abs().max()):.1e}; {_name(dtype)} ends at {torch.finfo(dtype).max:.1e}"
    return ""


def finite(number: float) -> bool:
    """Whether a number is one, and stays one in 32 bits."""
    try:
        return math.isfinite(number) and abs(number) <= LARGEST
    except OverflowError:  # a whole number beyond every float
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
