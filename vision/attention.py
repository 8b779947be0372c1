"""How learned keys enter SwinV2's attention, whose scores are cosines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import nn

from mmpeft.parts.attention import KeyValuePart, attend
from mmpeft.types import Args, Forward, Kwargs, Output


def cosine(
    host: nn.Module,
    run: Forward,
    parts: Sequence[KeyValuePart],
    args: Args,
    kwargs: Kwargs,
) -> Output:
    """`softmax(τ cos(q, [K_p; K]) + bias)`: learned keys are normalised and scaled as the window's own are."""
    return attend(host, run, parts, args, kwargs, keyed=partial(F.normalize, dim=-1))
