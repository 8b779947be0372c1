"""Losses of mask queries: each segment of the truth is explained by the query that fits it best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLASS, MASK, DICE, NOTHING = 2.0, 5.0, 5.0, 0.1
IGNORED = 255


def matched(classes: Tensor, masks: Tensor, target: Tensor) -> Tensor:
    """`2 CE(class) + 5 BCE(mask) + 5 dice(mask)` under the cheapest assignment of segments to queries.

    Queries without a segment learn "no object", at a tenth of the weight. The assignment is Hungarian, by the same
    terms (Cheng et al., arXiv:2112.01527).

    Args:
        classes: scores [B, Q, C + 1], the last one for no object.
        masks: logits [B, Q, H, W].
        target: class numbers [B, H, W]; from C on background, 255 for what does not count.
    """
    nothing = classes.shape[-1] - 1
    weight = torch.ones(nothing + 1, device=classes.device)
    weight[-1] = NOTHING
    wanted = torch.full(classes.shape[:2], nothing, device=classes.device)
    inside, total = classes.new_zeros(()), 0
    for row in range(len(target)):
        numbers = [int(n) for n in target[row].unique() if n < nothing]
        if not numbers:
            continue
        counts = (target[row] != IGNORED).flatten()
        truth = torch.stack([target[row] == n for n in numbers]).flatten(1)[:, counts].float()
        own = masks[row].float().flatten(1)[:, counts]
        queries, segments = assign(classes[row], own, truth, numbers)
        wanted[row, queries] = torch.tensor(numbers, device=wanted.device)[segments]
        chosen, goal = own[queries], truth[segments]
        cross = F.binary_cross_entropy_with_logits(chosen, goal, reduction="none").mean(1)
        overlap = 2 * (chosen.sigmoid() * goal).sum(1) / (chosen.sigmoid().sum(1) + goal.sum(1)).clamp(min=1e-6)
        inside = inside + (MASK * cross + DICE * (1 - overlap)).sum()
        total += len(queries)
    named = F.cross_entropy(classes.flatten(0, 1).float(), wanted.flatten(), weight=weight)
    return CLASS * named + inside / max(total, 1)


@torch.no_grad()
def assign(classes: Tensor, masks: Tensor, truth: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Queries and segments that belong together, by the least sum of costs.

    Args:
        classes: scores [Q, C + 1].
        masks: logits [Q, n].
        truth: segments [S, n] of zeros and ones.
        numbers: their classes.
    """
    from scipy.optimize import linear_sum_assignment

    probability = classes.float().softmax(-1)[:, numbers]
    positive, negative = F.softplus(-masks), F.softplus(masks)
    cross = (positive @ truth.t() + negative @ (1 - truth).t()) / truth.shape[1]
    shares = masks.sigmoid()
    dice = 1 - 2 * shares @ truth.t() / (shares.sum(1, keepdim=True) + truth.sum(1)[None]).clamp(min=1e-6)
    queries, segments = linear_sum_assignment((MASK * cross + DICE * dice - CLASS * probability).cpu().numpy())
    return torch.as_tensor(queries, device=masks.device), torch.as_tensor(segments, device=masks.device)
