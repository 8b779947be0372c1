"""InfLoRA (arXiv:2404.00228)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.hosting.modules import module_at
from mmpeft.methods.base import Method
from mmpeft.parts import LowRank
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches
from mmpeft.vision.continual.methods.gpm import Memory
from mmpeft.vision.continual.methods.o_lora import SummedLoRA


class InfLoRA(SummedLoRA):
    """`A_t` fixed to the top-r directions of the task's inputs outside those of old tasks; only `B_t` trains.

    `A_t = U_rᵀ / √3`, U the eigenvectors of `(I − MMᵀ) XᵀX`; M [d, m] spans what old tasks used: it grows by gradient
    projection memory until it holds the share ε of the inputs' energy, ε from `share` to 1 over the sequence. Kept is M
    or its complement, whichever is smaller. Branches sum with weight 1, so that past ones are folded into one entry and
    memory stays flat.
    """

    default = mmpeft.LoRA(rank=10, alpha=10.0, at="attn.{k,v}")

    def __init__(self, method: Method | None = None, share: float = 0.95) -> None:
        """
        Args:
            method: a low-rank method.
            share: ε at the first task.
        """
        super().__init__(method)
        if not 0 < share <= 1:
            raise ConfigError(f"share is a part of the energy in (0, 1], got {share}")
        self.share = share

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        if "memory" not in self.bank:
            self.bank.add_task("memory")
        name = f"t{task.number}"
        before = self.loras()
        self.bank.add_task(name, self.tuned())
        inputs = self._inputs(samples, before[-1] if before else None)
        for p in self.bank.tuning(name).placements:
            factor = p.part.factor
            if not isinstance(factor, LowRank):
                raise ConfigError(f"InfLoRA needs a low-rank method, got {self.method}")
            own = self.memory(p.home, inputs[p.home]).outside(inputs[p.home])
            directions = torch.linalg.eigh(own).eigenvectors.flip(1)[:, : len(factor.A)]
            with torch.no_grad():
                factor.A.copy_(directions.T / 3**0.5)
            factor.A.requires_grad_(False)

    def _inputs(self, samples: Batches, route: str | None) -> dict[str, Tensor]:
        """`XᵀX / n` [d, d] of the inputs of every tuned module."""
        names = {p.home for name in self.loras() for p in self.bank.tuning(name).placements}
        found: dict[str, Tensor] = {}
        count: dict[str, int] = {}

        def hook(home: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2).double()
                found[home] = found.get(home, 0) + x.T @ x
                count[home] = count.get(home, 0) + len(x)

            return see

        handles = [module_at(self.bank.model, n).register_forward_pre_hook(hook(n)) for n in names]
        try:
            with torch.no_grad():
                for images, _ in samples:
                    self.bank.features(images, route)
        finally:
            for handle in handles:
                handle.remove()
        return {home: total / count[home] for home, total in found.items()}

    def end(self, task: SequenceTask, samples: Batches) -> None:
        names = self.loras()
        self.bank.fold(names, into="past")
        wanted = self.share + (1 - self.share) * task.number / task.total
        for home, inputs in self._inputs(samples, "past").items():
            self._remember(home, self.memory(home, inputs).grown(inputs, wanted))
        super().end(task, samples)

    def memory(self, home: str, inputs: Tensor) -> Memory:
        """What past tasks use of the inputs `C` [d, d] of one module."""
        entry = self.bank["memory"]
        if home not in entry.state:
            return Memory.empty(inputs)
        return Memory(entry.state[home], free=home in entry.meta["free"])

    def _remember(self, home: str, memory: Memory) -> None:
        entry = self.bank["memory"]
        entry.state[home] = memory.basis
        others = {*entry.meta.get("free", ())} - {home}
        entry.meta["free"] = sorted(others | {home} if memory.free else others)
