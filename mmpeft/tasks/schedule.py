"""The learning-rate policy of every task."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: float) -> LambdaLR:
    """Linear warm-up over `warmup · steps` steps, then `½ (1 + cos πt)` to zero.

    A closed form of the step, so that a resumed run continues exactly.
    """
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return LambdaLR(optimizer, factor)
