"""Gradient projection memory: kept as itself or as its complement, it projects alike."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.vision.continual.methods.gpm import Memory, complement

D = 12


def inputs(rank: int, seed: int) -> Tensor:
    """`XᵀX` of inputs that vary in `rank` directions, and a little in all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, rank, generator=generator) @ torch.randn(rank, D, generator=generator)
    x = x + 1e-3 * torch.randn(100, D, generator=generator)
    return (x.T @ x).double() / 100


def turned(memory: Memory) -> Memory:
    """The same memory in its other form."""
    return Memory(complement(memory.basis), not memory.free)


def test_both_forms_project_and_grow_alike() -> None:
    memory, c = Memory.empty(inputs(1, 0)), inputs(D, 9)
    sizes = []
    for task, share in enumerate((0.95, 0.97, 0.99, 0.999, 1.0)):
        memory = memory.grown(inputs(3, task), share)
        other = turned(memory)
        torch.testing.assert_close(other.outside(c), memory.outside(c))
        torch.testing.assert_close(
            other.grown(inputs(3, 50), 0.99).outside(c), memory.grown(inputs(3, 50), 0.99).outside(c)
        )
        columns = memory.basis.shape[1]
        torch.testing.assert_close(memory.basis.T @ memory.basis, torch.eye(columns).double())
        sizes.append((columns, memory.free))
    assert all(columns <= D / 2 for columns, _ in sizes)
    assert {free for _, free in sizes} == {False, True}
    assert sizes[-1] == (0, True)  # everything is used: nothing is left to keep
    assert memory.outside(c).abs().max() == 0


def test_it_holds_the_share_asked_for_and_no_direction_more() -> None:
    memory = Memory.empty(inputs(3, 0))
    for share in (0.6, 0.9, 0.99):
        c = inputs(3, 0)
        memory = memory.grown(c, share)
        assert 1 - memory.outside(c).trace() / c.trace() >= share
    assert memory.basis.shape[1] <= 3
    again = memory.grown(c, 0.99)
    torch.testing.assert_close(again.outside(c), memory.outside(c))
