"""What code finds that reads a tensor for which parts answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.parts.base import Part
from mmpeft.parts.stacks import Stack
from mmpeft.parts.tuned import Traced, Tuned
from mmpeft.types import Attribute

NATIVE = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
"""Modules whose weights, if plain, enter a kernel of their own without gradients: a tuned one keeps to it."""


def answered(host: nn.Module, name: str, base: Attribute, parts: Sequence[Part]) -> Attribute:
    """What code finds that reads an attribute of `host` for which `parts` answer, the innermost first.

    A weight that parts change by what they do to its product answers as such. Where a graph is traced it is a formed
    one, which any compiler understands, unless it depends on what it is multiplied by. A transposed convolution finds
    the formed one always.
    """
    first = next((i for i, part in enumerate(parts) if part.answers), len(parts))
    outer = parts[first:]
    for part in parts[:first]:
        base = part.read(host, name, base)
    weighs = isinstance(base, Tensor) and base.dim() > 1 and base.is_floating_point()
    kernel = weighs and base.dim() > 2 and any(getattr(part, "transposed", False) for part in outer)
    if weighs and not kernel and outer and all(part.answers for part in outer):
        dynamo, transformed = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
        traced = dynamo or transformed or torch._C._get_tracing_state() is not None
        if all(part.stacked for part in outer):
            if traced and any(part.needs_input for part in outer):
                raise Refused(
                    "a traced pass reads the values of experts' weights, which know of no dropout: set it to 0"
                )
            if not traced and base.dim() == 3:
                return Stack.read(host, name, base, tuple(outer))
        elif any(part.needs_input for part in outer):
            kind = Traced if torch.compiler.is_dynamo_compiling() else Tuned
            return kind.read(host, name, base, tuple(outer))
        elif not (traced or (isinstance(host, NATIVE) and not torch.is_grad_enabled() and not host.training)):
            return Tuned.read(host, name, base, tuple(outer))
    for part in outer:
        base = part.read(host, name, base)
    return base
