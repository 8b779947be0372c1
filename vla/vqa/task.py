"""Visual question answering with an image-text pair: answers from a vocabulary, by both towers and a small fusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmpeft.errors import ConfigError, DataError
from mmpeft.files import write_atomic
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Frozen
from mmpeft.recompute import Recompute
from mmpeft.training.module import TuningModule
from mmpeft.tuning import Tuning
from mmpeft.vla.backbone import Tokenizer, create, preprocessing, tokenizer
from mmpeft.vla.taps import Taps
from mmpeft.vla.vqa.model import Fusion, patch_grid
from mmpeft.vla.vqa.picture import answered

SHOWN = 8


class VisualQuestions(TuningModule):
    """Trains a fusion transformer, and by a method the towers, to answer; `−Σ_a s_a log softmax(z)_a / Σ_a s_a`.

    s are the scores of the answers, one 1 for scenes and `min(n/3, 1)` for VQAv2. Reported is the mean score of the
    answers given, over all questions and by type.
    """

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        fusion: Fusion | None = None,
        pretrained: bool = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        lr_scheduler: LRSchedulerCallable | None = None,
        recompute: Recompute = None,
        compile: bool = False,
        image_size: int | None = 128,
    ) -> None:
        """Args:
        backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
        method: what is trained of the towers and how; none for the fusion transformer alone.
        fusion: its size, and whether it is blind to the image.
        pretrained: whether to load the pair's weights.
        optimizer: any torch optimiser, given everything that trains.
        warmup: share of all steps with a linear rise of the learning rate; cosine decay to zero follows.
        lr_scheduler: a scheduler in place of warm-up and cosine, stepped after each optimiser step.
        recompute: what blocks compute again in the backward pass: nothing, `pointwise` operations, or `block`.
        compile: compile every block with torch.compile.
        image_size: height and width in pixels; None for the pair's own.
        """
        method = method or Frozen()
        super().__init__(method, optimizer, warmup, recompute, compile, train_head=False, lr_scheduler=lr_scheduler)
        self.backbone, self.pretrained, self.image_size = backbone, pretrained, image_size
        self.fusion = fusion or Fusion()
        self.answers: list[str] = []
        self.types: list[str] = []
        self.tokenizer: Tokenizer | None = None

    def build(self) -> nn.Module:
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            self.answers, self.types = list(data.answers), list(data.types)
        if not self.answers:
            raise ConfigError(f"{type(data).__name__} names no answers")
        model = create(self.backbone, self.pretrained, self.image_size)
        self.tokenizer = tokenizer(self.backbone)
        if data is not None:
            data.configure(*preprocessing(model))
            data.check(self.tokenizer)
        return model

    def prepare(self) -> Tuning:
        first = self.tuning is None
        tuning = super().prepare()
        if first:
            model: Any = self.model
            self.image, self.text = Taps(model), Taps(model, "text")
            size, self.mean, self.std = preprocessing(model)
            self.fusion.start(self.image, self.text, patch_grid(self.image, size), len(self.answers))
            names = [f"{s}_{k}" for s in ("val", "test") for k in ("all", *self.types)]
            self.metrics = nn.ModuleDict({name: MeanMetric() for name in names})
        return tuning

    def forward(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Scores [B, A] of the answers, before the softmax."""
        self.prepare()
        assert self.tokenizer is not None
        tokens = self.tokenizer(list(questions)).to(self.device)
        padding = tokens == self.tokenizer([""])[0, -1].to(self.device)
        last = len(self.text.paths) - 1
        asked = self.text(tokens, [last])[last]
        patches = None
        if not self.fusion.blind:
            last = len(self.image.paths) - 1
            patches = self.image.patches(self.image(images, [last])[last])
        scores: Tensor = self.fusion(patches, asked, padding)
        return scores

    def loss(self, batch: tuple[Tensor, Sequence[str], Tensor, Tensor], index: int) -> Tensor:
        images, questions, right, _ = batch
        share = right / right.sum(1, keepdim=True).clamp(min=1e-6)
        loss = -(share * self(images, questions).float().log_softmax(1)).sum(1).mean()
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Sequence[str], Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, index, "val")

    def test_step(self, batch: tuple[Tensor, Sequence[str], Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, index, "test")

    def _evaluate(self, batch: tuple[Tensor, Sequence[str], Tensor, Tensor], index: int, stage: str) -> None:
        images, questions, right, types = batch
        given = self(images, questions).argmax(1)
        score = right.gather(1, given[:, None])[:, 0]
        self.metrics[f"{stage}_all"].update(score)
        for number, name in enumerate(self.types):
            if (types == number).any():
                self.metrics[f"{stage}_{name}"].update(score[types == number])
        if index == 0 and not self.trainer.sanity_checking and self.logger is not None and self.trainer.is_global_zero:
            mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
            lines = [
                (q, self.answers[int(r.argmax())], self.answers[int(a)])
                for q, r, a in zip(questions[:SHOWN], right, given)
            ]
            name = f"{stage}_{self.current_epoch:03d}" if stage == "val" else stage
            picture = answered(images[:SHOWN] * std + mean, lines)
            write_atomic(Path(self.trainer.log_dir or ".") / "answers" / f"{name}.png", picture)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        for name in ("all", *self.types):
            metric = self.metrics[f"{stage}_{name}"]
            if metric.update_called:
                self.log(f"{stage}/{'accuracy' if name == 'all' else name}", metric.compute(), prog_bar=name == "all")
            metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["answers"] = self.answers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("answers", self.answers) != self.answers:
            raise DataError(
                "the checkpoint was trained with other answers than the data module has: they would be misread"
            )
