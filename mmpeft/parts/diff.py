"""`Diff`: a dense change of a named tensor behind gates that training closes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.functional.hard_concrete import hard_concrete, logistic_noise, open_probability
from mmpeft.functional.rows import Rows, put_rows, take_rows
from mmpeft.parts.base import Part, cast, trainable_dtype

OPEN = 30.0
"""An α at which a gate is 1, and at whose negative it is 0, whatever else happens."""


class Diff(Part):
    """`θ = θ0 + z ⊙ w`, w from 0, z a hard-concrete gate of `α = α0 + speed a` for each entry.

    With `grouped`, one more gate for the whole tensor multiplies them. The noise of a forward pass is drawn before it
    and kept, so that every reader of the tensor and a block that is computed again see the same gates; evaluation and
    whatever runs between steps see none. A mask, once chosen, replaces the gates, and their values tell it to files.
    """

    order = 2
    scalable = True
    rowwise = False
    quiet: ClassVar[tuple[str, ...]] = ("a", "a_group")

    noise: Tensor
    noise_group: Tensor
    mask: Tensor | None

    def __init__(
        self, base: Tensor, *, rows: Rows | None, dim: int, start: float, speed: float, grouped: bool, made_for: str
    ) -> None:
        super().__init__()
        self.rows, self.dim, self.shape, self.made_for = rows, dim, tuple(base.shape), made_for
        self.start, self.speed = start, speed
        own = torch.zeros_like(take_rows(base.detach(), rows, dim), dtype=trainable_dtype(base.dtype))
        own = own.contiguous()
        self.w, self.a = nn.Parameter(own), nn.Parameter(own.clone())
        self.a_group = nn.Parameter(own.new_zeros(1)) if grouped else None
        self.register_buffer("noise", own.new_zeros(()), persistent=False)
        self.register_buffer("noise_group", own.new_zeros(()), persistent=False)
        self.register_buffer("mask", None, persistent=False)

    def draw(self, generator: torch.Generator) -> None:
        """New noise for the next forward pass."""
        if self.noise.dim() != self.w.dim():
            self.noise = torch.empty_like(self.w)
        logistic_noise(self.noise, generator)
        if self.a_group is not None:
            self.noise_group = logistic_noise(torch.empty_like(self.a_group), generator)

    def calm(self) -> None:
        """Forget the noise."""
        self.noise, self.noise_group = self.w.new_zeros(()), self.w.new_zeros(())

    def delta(self) -> Tensor:
        """`z ⊙ w`, as it acts now."""
        if self.mask is not None:
            return self.w * self.mask
        noise = self.training
        z = hard_concrete(self.start + self.speed * self.a, self.noise if noise else 0.0)
        if self.a_group is not None:
            z = z * hard_concrete(self.start + self.speed * self.a_group, self.noise_group if noise else 0.0)
        return self.w * z

    def expected_entries(self) -> Tensor:
        """`E ‖z‖₀`: of an entry and its group both open."""
        if self.mask is not None:
            return self.a.sum() * 0.0  # keeps every tensor in the graph: replicas wait for all gradients
        found = open_probability(self.start + self.speed * self.a).sum()
        if self.a_group is not None:
            found = found * open_probability(self.start + self.speed * self.a_group).squeeze(0)
        return found

    @torch.no_grad()
    def fix(self, mask: Tensor) -> None:
        """From now on exactly the entries of `mask` change, beginning where they are."""
        self.calm()
        self.w.copy_(self.delta())
        self.mask = mask
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Set values and gates to what the mask says; momentum has moved some that it leaves out."""
        assert self.mask is not None
        self.w.mul_(self.mask)
        self.a.copy_(torch.where(self.mask, OPEN, -OPEN) / self.speed - self.start / self.speed)
        if self.a_group is not None:
            self.a_group.fill_((OPEN - self.start) / self.speed)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        tuned = take_rows(base, self.rows, self.dim) + cast(self.delta(), base.dtype)
        return put_rows(base, tuned, self.rows, self.dim)
