"""PromptSRC: what is learned stays near the frozen pair, and is averaged over the epochs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mmpeft.surgery.choice import use
from mmpeft.types import StateDict

if TYPE_CHECKING:
    from mmpeft.vla.fewshot.task import FewShot


class Consistency:
    """`w_t |t − t₀|₁ + w_i |f − f₀|₁ + w_s KL(softmax(s₀) ‖ softmax(s))` (Khattak et al., arXiv:2307.06948).

    f, t and s are the tuned unit features and scores, those with index 0 the frozen ones; |·|₁ is the mean absolute
    difference, and KL the mean over images of the sum over classes. With `average`, the tensors kept in the end are the
    mean over epochs with Gaussian weights around `mean` of the run, `std` wide, both as shares of all epochs.
    """

    def __init__(
        self,
        text: float = 25.0,
        image: float = 10.0,
        scores: float = 1.0,
        average: bool = True,
        mean: float = 0.75,
        std: float = 0.05,
    ) -> None:
        self.text, self.image, self.scores = text, image, scores
        self.average, self.mean, self.std = average, mean, std

    def __call__(self, task: FewShot, images: Tensor, image: Tensor, text: Tensor, scores: Tensor) -> Tensor:
        """The three terms for a batch."""
        assert task.model is not None
        with torch.no_grad(), use(task.model, None):
            before = task.image_features(images)
            frozen = task.frozen_text[: task.base]
            plain = task.scale * before @ frozen.t()
        nearness = F.kl_div(scores.log_softmax(1), plain.log_softmax(1), reduction="batchmean", log_target=True)
        return (
            self.text * (text - frozen).abs().mean()
            + self.image * (image - before).abs().mean()
            + self.scores * nearness
        )

    def callbacks(self) -> list[Callback]:
        """The averaging over epochs, where it is wanted."""
        return [GaussianAverage(self.mean, self.std)] if self.average else []


class GaussianAverage(Callback):
    """`θ = Σ_e w_e θ_e`, `w_e ∝ exp(−(e − μE)² / 2 (σE)²)` over the epochs e = 1 … E, set at the end of the last.

    So early that the run's last checkpoint and its adapter have it.
    """

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std
        self.total, self.sum = 0.0, list[Tensor]()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        epochs = trainer.max_epochs or 1
        if epochs < 0:  # counted in steps
            epochs = math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / trainer.num_training_batches)
        away = (trainer.current_epoch + 1 - self.mean * epochs) / max(self.std * epochs, 1.0)
        weight = math.exp(-0.5 * away * away)
        own = [p.detach() for p in module.parameters() if p.requires_grad]
        self.sum = [weight * p if not self.sum else s + weight * p for s, p in zip(self.sum or own, own)]
        self.total += weight
        steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if steps or trainer.current_epoch + 1 == trainer.max_epochs:
            self._settle(module)

    def _settle(self, module: LightningModule) -> None:
        with torch.no_grad():
            for parameter, total in zip([p for p in module.parameters() if p.requires_grad], self.sum):
                parameter.copy_(total / self.total)

    def state_dict(self) -> StateDict:
        return {"total": self.total, "sum": self.sum}

    def load_state_dict(self, state_dict: StateDict) -> None:
        self.total, self.sum = state_dict["total"], state_dict["sum"]
