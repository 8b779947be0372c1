"""The k largest of very many scores, without sorting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BITS = 31


def kth_largest(scores: Sequence[Tensor], k: int) -> Float[Tensor, ""]:
    """The k-th largest of all values >= 0 in several tensors, exactly; no tensor is sorted, joined or copied to host.

    Bits of a non-negative fp32 number, read as an integer, are ordered like the numbers: the threshold is built bit by
    bit in 31 counting passes.
    """
    device = scores[0].device
    found = torch.zeros((), dtype=torch.int64, device=device)
    words = [score.detach().float().contiguous().view(torch.int32) for score in scores]
    for bit in range(BITS - 1, -1, -1):
        candidate = found | (1 << bit)
        count = sum((word >= candidate.to(word.device)).sum().to(device) for word in words)
        found = torch.where(torch.as_tensor(count) >= k, candidate, found)
    return found.to(torch.int32).view(torch.float32)


def top_k_masks(scores: Mapping[str, Tensor], k: int) -> dict[str, Bool[Tensor, ...]]:
    """Which entries are among the k largest of all: exactly k, the first ones where the k-th value is tied."""
    total = sum(score.numel() for score in scores.values())
    if not 0 < k <= total:
        raise ValueError(f"expected 0 < k <= {total}, got {k}")
    threshold = kth_largest(list(scores.values()), k)
    masks = {name: score > threshold.to(score.device) for name, score in scores.items()}
    missing = k - sum(int(mask.sum()) for mask in masks.values())
    for name, score in scores.items():
        if missing <= 0:
            break
        ties = (score == threshold.to(score.device)).flatten().nonzero().flatten()[:missing]
        masks[name].view(-1)[ties] = True
        missing -= len(ties)
    return masks


def keep_largest(scores: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """As `top_k_masks` for one short vector, without waiting for the device."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.topk(k).indices, True)
