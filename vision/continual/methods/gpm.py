"""Gradient projection memory (arXiv:2103.09762) in the two forms of DualGPM (arXiv:2404.00228)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """The subspace of R^d that past tasks use: an orthonormal basis [d, m] of it, or of what is left over.

    `free` says which. `grown` keeps the one with fewer columns, m <= d / 2; projections are the same in both.
    """

    basis: Tensor
    free: bool = False

    @classmethod
    def empty(cls, inputs: Tensor) -> Memory:
        """No task yet, for inputs `C` [d, d]."""
        return cls(inputs.new_zeros(len(inputs), 0))

    def outside(self, inputs: Tensor) -> Tensor:
        """`(I − P) C (I − P)`, P the projection onto the memory."""
        off = self.basis @ self.basis.T
        if not self.free:
            off = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device) - off
        return off @ inputs @ off

    def grown(self, inputs: Tensor, share: float) -> Memory:
        """With as few further directions as hold `share` of the energy of inputs `C` [d, d]."""
        rest, total = self.outside(inputs), inputs.trace()
        # The eigenvectors are sought inside what is left over, so that new directions are orthogonal to the memory.
        left = self.basis if self.free else complement(self.basis)
        values, vectors = torch.linalg.eigh(left.T @ inputs @ left)
        values, vectors = values.flip(0).clamp_min(0), left @ vectors.flip(1)
        held = (total - rest.trace()) / total + torch.cat([values.new_zeros(1), values.cumsum(0)]) / total
        stays = vectors[:, int((held < share).sum()) :]
        free = 2 * stays.shape[1] < len(inputs)
        return Memory(stays if free else complement(stays), free)


def complement(basis: Tensor) -> Tensor:
    """An orthonormal basis [d, d − m] of what an orthonormal basis [d, m] does not span."""
    whole: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return whole[:, basis.shape[1] :]
