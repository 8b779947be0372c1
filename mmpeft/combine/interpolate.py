"""Between the base and what it was tuned to, without a second checkpoint (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmpeft.hosting.host import base_value
from mmpeft.surgery.merging import exchange
from mmpeft.tuning import Tuning


@contextmanager
def interpolate(tuning: Tuning, share: float) -> Iterator[None]:
    """Run with `θ = θ₀ + α (θ₁ − θ₀)`, θ₀ the base and θ₁ the merged weights; both come back bit for bit.

    Args:
        tuning: one that can be merged.
        share: α; 0 is the base, 1 the tuned model, and values beyond go further the same way.

    Raises:
        Refused: a part is no change of base weights. ConfigError: the tuning is merged already.
        Paper: https://arxiv.org/abs/2109.01903
    """
    tuning.merge()
    try:
        state = tuning._state
        with torch.no_grad():
            for path, name, before in state.merged[tuning.name]:
                host = state.hosts[path]
                after = base_value(host, name)
                start = torch.zeros_like(after) if before is None else before
                exchange(host, name, torch.lerp(start.float(), after.float(), share).to(after.dtype))
        yield
    finally:
        tuning.unmerge()
