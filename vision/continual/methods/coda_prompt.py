"""CODA-Prompt (arXiv:2211.13218)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft
from mmpeft.bank.router import soft_weights
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.parts import Prefix
from mmpeft.surgery.mixture import Mixture
from mmpeft.vision.continual.data import SequenceTask
from mmpeft.vision.continual.learner import Batches, TaskHeads


class CODAPrompt(TaskHeads):
    """Prefixes composed for each image of all components so far, `P = Σ_m cos(q ⊙ A_m, K_m) P_m` at each layer.

    q is the frozen backbone's feature. Each task adds components, which start orthonormal to those before (P, K and A
    each) and are frozen after it. Loss: cross entropy `+ λ Σ mean((R Rᵀ − I)²)`, R the rows of P, of K and of A.
    """

    default = mmpeft.PTuningV2(at="kv & depth<=4", tokens=4)

    def __init__(self, method: Method | None = None, components: int = 10, orthogonal: float = 0.1) -> None:
        """
        Args:
            method: the prefix that is one component.
            components: how many a task adds (the paper has 100 in all).
            orthogonal: λ.
        """
        super().__init__(method)
        if components < 1:
            raise ConfigError(f"each task adds at least one component, got {components}")
        self.components, self.orthogonal = components, orthogonal

    def extend(self, task: SequenceTask, samples: Batches) -> None:
        one = self.tuned()
        if not isinstance(one, mmpeft.PTuningV2):
            raise ConfigError(f"components are learned keys and values; expected PTuningV2, got {one}")
        before = [rows.detach() for rows in self.rows()] if self.pools() else []
        name = f"t{task.number}"
        entry = self.bank.add_task(name, replace(one, tokens=self.components * one.tokens))
        parts = self.parts(name)
        like = next(self.bank.model.parameters())
        shape = (len(parts), self.components, self.width)
        found = [torch.rand(shape, device=like.device) for _ in range(2)]
        found.insert(0, torch.rand_like(self.prompts(name)))
        tokens, focus, keys = (
            orthonormal(new, old) for new, old in zip(found, before or [rows[:, :0] for rows in found], strict=True)
        )
        entry.learned["focus"], entry.learned["anchors"] = nn.Parameter(focus), nn.Parameter(keys)
        with torch.no_grad():
            for part, new in zip(parts, tokens, strict=True):
                own = part.keys_and_values().unflatten(1, (self.components, -1)).transpose(0, 1)  # [M, 2, p, h, d]
                own.copy_(new.view_as(own))

    def pools(self) -> list[str]:
        """Entries that hold the components, in the order of the tasks."""
        return [name for name in self.bank.ids if self.bank[name].method is not None]

    def parts(self, name: str) -> list[Prefix]:
        """The components of one entry by layer, side by side."""
        found = [p.part for p in self.bank.tuning(name).placements]
        return [part for part in found if isinstance(part, Prefix)]

    def prompts(self, name: str) -> Tensor:
        """The components of one entry as rows, [L, M, 2 p h d]."""
        tokens: Tensor = torch.stack([part.keys_and_values() for part in self.parts(name)])
        rows: Tensor = tokens.unflatten(2, (self.components, -1))
        return rows.transpose(1, 2).flatten(2)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """P [L, M, 2 p h d], A and K [L, M, d] of all tasks so far."""
        entries = [self.bank[name].learned for name in self.pools()]
        return (
            torch.cat([self.prompts(name) for name in self.pools()], dim=1),
            torch.cat([learned["focus"] for learned in entries], dim=1),
            torch.cat([learned["anchors"] for learned in entries], dim=1),
        )

    def route(self) -> None:
        return None

    def _features(self, images: Tensor) -> Tensor:
        query, names = self.bank.query(images), self.pools()
        entries = [self.bank[name].learned for name in names]
        weights = [soft_weights(query, learned["focus"], learned["anchors"]) for learned in entries]
        return self.bank.features(images, Mixture(tuple(names), tuple(weights)))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = self.local(self._features(images), labels)
        return loss + self.orthogonal * torch.stack([dependence(rows) for rows in self.rows()]).sum()

    def scores(self, images: Tensor) -> Tensor:
        return self.logits(self._features(images))


def dependence(rows: Tensor) -> Tensor:
    """`Σ_l mean((R Rᵀ − I)²)` of rows R [L, M, d]: zero where they are orthonormal."""
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return (rows @ rows.mT - eye).square().mean((1, 2)).sum()


def orthonormal(new: Tensor, old: Tensor) -> Tensor:
    """Rows `new` [L, n, d] made orthonormal, and orthogonal to `old` [L, m, d]; of unit length only where m + n > d."""
    if new.shape[1] + old.shape[1] > new.shape[2]:
        return F.normalize(new, dim=-1)
    # Old rows have moved since they were made orthonormal: what is left out is their span.
    past = torch.linalg.qr(old.mT).Q
    whole = torch.cat([past, new.mT], dim=2)
    basis: Tensor = torch.linalg.qr(whole).Q
    return basis[:, :, past.shape[2] :].mT.contiguous()
