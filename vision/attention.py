"""How learned keys enter SwinV2's attention, whose scores are cosines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from mmpeft.parts.attention import KeyValuePart, attend


def cosine(
    host: nn.Module,
    run: Callable[..., Any],
    parts: Sequence[KeyValuePart],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`softmax(τ cos(q, [K_p; K]) + bias)`: learned keys are normalised and scaled as the window's own are."""
    return attend(host, run, parts, args, kwargs, keyed=partial(F.normalize, dim=-1))
