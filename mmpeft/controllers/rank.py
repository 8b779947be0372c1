"""Which rank components of low-rank updates live: scored, selected under a falling budget, gated, drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.controllers.base import Controller
from mmpeft.controllers.schedule import cubic, linear
from mmpeft.errors import ConfigError
from mmpeft.functional.top_k import keep_largest
from mmpeft.parts.factors import DiagonalLowRank, NestedLowRank
from mmpeft.types import Facts, StateDict


class RankAllocation(Controller):
    """AdaLoRA's budget over all components `(B_k, g_k, A_k)`, and its orthogonality term.

    A scalar w scores `Ī Ū` with `I = |w ∂L/∂w|`, `Ī ← β₁ Ī + (1 - β₁) I` and `Ū ← β₂ Ū + (1 - β₂) |I - Ī|`; a component
    `S(g_k) + mean_i S(A_ki) + mean_j S(B_jk)`. Every `every` steps all but the `b(t)` best have `g_k = 0`; b falls by a
    cubic from all to `target` per factor between `warmup` and `1 - settle` of the run, and from then on the choice is
    final. The loss gets `γ mean ‖PPᵀ - I‖_F` over all A and Bᵀ.
    """

    def __init__(
        self,
        factors: Sequence[DiagonalLowRank],
        target: int,
        *,
        warmup: float,
        settle: float,
        every: int,
        beta1: float,
        beta2: float,
        gamma: float,
    ) -> None:
        self.factors, self.every, self.gamma, self.betas = list(factors), every, gamma, (beta1, beta2)
        self.sizes = [len(factor.g) for factor in self.factors]
        self.target = target * len(self.factors)
        self.warmup, self.settle, self.first, self.last = warmup, settle, 0, 0
        if self.target > sum(self.sizes):
            raise ConfigError(f"a target rank of {target} is above the rank {max(self.sizes)} to start from")
        self.tensors = [tensor for factor in self.factors for tensor in (factor.g, factor.A, factor.B)]
        self.importance = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.uncertainty = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.alive = [torch.ones(len(factor.g), dtype=torch.bool, device=factor.g.device) for factor in self.factors]

    def fit_start(self, total: int) -> None:
        self.first, self.last = round(self.warmup * total), round((1 - self.settle) * total)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if step > self.last:
            return
        beta1, beta2 = self.betas
        for tensor, mean, spread in zip(self.tensors, self.importance, self.uncertainty):
            if tensor.grad is not None:
                now = (tensor * tensor.grad).abs_()
                mean.lerp_(now, 1 - beta1)
                spread.lerp_((now - mean).abs_(), 1 - beta2)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step == self.last or (self.first <= step < self.last and step % self.every == 0):
            self._select(round(cubic(step, sum(self.sizes), self.target, self.first, self.last)))
        for factor, alive in zip(self.factors, self.alive):
            factor.g.mul_(alive)

    def fit_end(self) -> None:
        with torch.no_grad():
            if sum(int(alive.sum()) for alive in self.alive) > self.target:  # a run shorter than its schedule
                self._select(self.target)
            for factor, alive in zip(self.factors, self.alive):
                factor.g.mul_(alive)

    def _select(self, budget: int) -> None:
        scores = [mean * spread for mean, spread in zip(self.importance, self.uncertainty)]
        triples = zip(scores[0::3], scores[1::3], scores[2::3])
        component = torch.cat([g + down.mean(1) + up.mean(0) for g, down, up in triples])
        self.alive = list(keep_largest(component, budget).split(self.sizes))

    def penalty(self) -> Tensor:
        terms = [_orthogonality(p) for factor in self.factors for p in (factor.A, factor.B.t())]
        return self.gamma * torch.stack(terms).mean()

    def values(self) -> dict[str, Tensor]:
        return {"rank": torch.stack([alive.sum() for alive in self.alive]).float().mean()}

    def state_dict(self) -> StateDict:
        return {"importance": self.importance, "uncertainty": self.uncertainty, "alive": self.alive}

    def load_state_dict(self, state: Facts) -> None:
        for own, saved in ((self.importance, "importance"), (self.uncertainty, "uncertainty"), (self.alive, "alive")):
            for tensor, value in zip(own, state[saved], strict=True):
                tensor.copy_(value)


def _orthogonality(rows: Tensor) -> Tensor:
    """`‖P Pᵀ - I‖_F`."""
    gram: Tensor = rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return gram.square().sum().sqrt()


class GateSparsity(Controller):
    """SoRA: `λ ‖g‖₁ / n` in the loss, and after every step the proximal `g ← sign(g) max(|g| - ξ(t), 0)`.

    With `schedule` ξ grows linearly from 0 over the run, else it is constant.
    """

    def __init__(self, factors: Sequence[DiagonalLowRank], weight: float, threshold: float, schedule: bool) -> None:
        self.gates: list[Tensor] = [factor.g for factor in factors]
        self.weight, self.threshold, self.schedule, self.total = weight, threshold, schedule, 1

    def fit_start(self, total: int) -> None:
        self.total = total

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        threshold = linear(step + 1, 0.0, self.threshold, 0, self.total) if self.schedule else self.threshold
        for gate in self.gates:
            gate.copy_(torch.nn.functional.softshrink(gate, threshold))

    def penalty(self) -> Tensor:
        return self.weight * torch.cat(self.gates).abs().mean()

    def values(self) -> dict[str, Tensor]:
        return {"rank": torch.stack([(gate != 0).sum() for gate in self.gates]).float().mean()}


class RandomRank(Controller):
    """DyLoRA: one rank `b ~ U{least, …, r}` for all modules at each step; all of them again at the end."""

    def __init__(self, factors: Sequence[NestedLowRank], least: int) -> None:
        self.factors, self.least = list(factors), least

    def before_forward(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)  # the same on every process and micro-batch
        for factor in self.factors:
            generator.manual_seed(step)
            factor.active = int(torch.randint(self.least, len(factor.A) + 1, (), generator=generator))

    def after_step(self, step: int) -> None:
        for factor in self.factors:  # what runs between steps is the whole
            factor.active = len(factor.A)
