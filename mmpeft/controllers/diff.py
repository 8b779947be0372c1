"""Diff pruning in three stages: gates and values together, the choice, the chosen values alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.controllers.base import Controller
from mmpeft.functional.top_k import top_k_masks
from mmpeft.parts.diff import Diff
from mmpeft.types import Facts, StateDict


class DiffSelection(Controller):
    """`λ E ‖z‖₀` in the loss until the share `until` of the run; then the `keep` largest `|z w|` of all stay.

    Noise is drawn for each micro-batch from its number alone: the same on every process and in a resumed run.
    """

    def __init__(self, parts: Sequence[Diff], penalty: float, until: float, keep: int) -> None:
        self.parts, self.weight, self.until, self.keep = list(parts), penalty, until, keep
        self.entries = sum(part.w.numel() for part in self.parts)
        self.last, self.micro = 0, 0

    @property
    def fixed(self) -> bool:
        return self.parts[0].mask is not None

    def fit_start(self, total: int) -> None:
        self.last = max(1, round(self.until * total))

    def before_forward(self, step: int) -> None:
        if self.fixed:
            return
        for part in self.parts:
            generator = torch.Generator(part.w.device).manual_seed((step << 20) + self.micro)
            self.micro += 1
            part.draw(generator)

    def after_step(self, step: int) -> None:
        self.micro = 0
        if not self.fixed:
            for part in self.parts:
                part.calm()
            if step + 1 >= self.last:
                self._select()

    def fit_end(self) -> None:
        if not self.fixed:  # a run shorter than its schedule
            self._select()
        for part in self.parts:
            part.settle()

    @torch.no_grad()
    def _select(self) -> None:
        for part in self.parts:
            part.calm()
        scores = {str(i): part.delta().abs() for i, part in enumerate(self.parts)}
        for part, mask in zip(self.parts, top_k_masks(scores, self.keep).values()):
            part.fix(mask)

    def penalty(self) -> Tensor:
        return self.weight * torch.stack([part.expected_entries() for part in self.parts]).sum()

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        if self.fixed:
            return {"density": torch.tensor(self.keep / self.entries)}
        return {"density": torch.stack([part.expected_entries() for part in self.parts]).sum() / self.entries}

    def state_dict(self) -> StateDict:
        return {"masks": [part.mask for part in self.parts] if self.fixed else []}

    def load_state_dict(self, state: Facts) -> None:
        for part, mask in zip(self.parts, state["masks"]):
            part.mask = mask.to(part.w.device)
