"""Visual question answering with an image-text pair: both towers, a fusion transformer, a vocabulary of answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmpeft.errors import ConfigError, DataError, Refused
from mmpeft.hosting.recompute import Recompute
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Frozen
from mmpeft.parts.in_place import InPlace
from mmpeft.tasks.module import TuningModule
from mmpeft.tuning import Tuning
from mmpeft.vla.backbone import Tokenizer, create, preprocessing, tokenizer
from mmpeft.vla.taps import Taps, projection
from mmpeft.vla.vqa.data import Asked
from mmpeft.vla.vqa.model import Fusion, Joint, patch_grid
from mmpeft.vla.vqa.show import AnswerWriter, show

SHOWN = 8
TOP = 3


class VisualQuestions(TuningModule):
    """Trains a fusion transformer, and by a method the towers, to answer questions about images.

    The loss is `−log softmax(z)_a` of the one true answer; where several are right to a degree s (VQAv2), it is
    `Σ_a BCE(σ(z_a), s_a)`. Reported is the mean score of the answers given, over all questions and by type.
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
        """
        Args:
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
        self.soft = False
        self.tokenizer: Tokenizer | None = None

    def build(self) -> nn.Module:
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is not None:
            self.answers, self.types = list(getattr(data, "answers", ())), list(getattr(data, "types", ()))
            self.soft = bool(getattr(data, "soft", False))
        if not self.answers:
            raise ConfigError(f"{type(data).__name__} names no answers; VisualQuestions chooses among them")
        model = create(self.backbone, self.pretrained, self.image_size)
        self.tokenizer = tokenizer(self.backbone)
        if data is not None:
            data.configure(*preprocessing(model))
            data.check(self.tokenizer)
        return model

    def prepare(self) -> Tuning:
        first = self.tuning is None
        waiting, self._waiting = self._waiting, None  # the fusion transformer has no tensors to load into before start
        tuning = super().prepare()
        if first:
            if any(isinstance(p.part, InPlace) for p in tuning.placements):
                raise Refused(f"{self.method} puts learned tokens in the place of the question's words; take others")
            model: Any = self.model
            self.image, self.text = Taps(model), Taps(model, "text")
            size, self.mean, self.std = preprocessing(model)
            grid, joint = patch_grid(self.image, size), None
            with suppress(Refused):  # of a tower that pools by attention, single patches are not in the joint space
                joint = projection(model)(torch.zeros(1, 1, self.image.width)).shape[-1]
            self.joint = joint is not None
            self.fusion.start(self.image, self.text, grid, len(self.answers), joint)
            names = [f"{s}_{k}" for s in ("val", "test") for k in ("all", *self.types)]
            self.metrics = nn.ModuleDict({name: MeanMetric() for name in names})
            if waiting is not None:
                self.load_state_dict(waiting)
        return tuning

    def forward(self, images: Tensor, questions: Sequence[str], owner: Tensor | None = None) -> Tensor:
        """Scores [Q, A] of the answers, before the softmax, for Q questions about images [B, 3, H, W].

        `owner` int64 [Q] says which image a question is about; without it, each has one question.
        """
        self.prepare()
        assert self.tokenizer is not None
        tokens = self.tokenizer(list(questions)).to(images.device)
        padding = tokens == self.tokenizer([""])[0, -1].to(images.device)
        asked, whole = self._last(self.text, tokens)
        if asked.shape[1] != tokens.shape[1]:
            raise Refused(f"{self.method} changes the number of question tokens: their padding is not known any more")
        longest = int((~padding).sum(1).max())  # padding is at the end; what no question reaches costs time alone
        patches = joint = None
        if not self.fusion.blind:
            patches = self.image.patches(self._last(self.image, images)[0])
            if self.joint:
                joint = Joint(F.normalize(projection(self.model)(patches), dim=-1), F.normalize(whole, dim=-1))
        owner = torch.arange(len(asked), device=images.device) if owner is None else owner
        scores: Tensor = self.fusion(patches, asked[:, :longest], padding[:, :longest], owner, joint)
        return scores

    @staticmethod
    def _last(tower: Taps, inputs: Tensor) -> tuple[Tensor, Tensor]:
        last = len(tower.paths) - 1
        features, whole = tower.embedded(inputs, [last])
        return features[last], whole

    def loss(self, batch: Asked, index: int) -> Tensor:
        scores = self(batch.images, batch.questions, batch.owner).float()
        if self.soft:
            loss = F.binary_cross_entropy_with_logits(scores, batch.scores, reduction="sum") / len(scores)
        else:
            loss = F.cross_entropy(scores, batch.scores)
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(scores))
        return loss

    # -- evaluation ------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Lightning's hook: `predict` writes a file."""
        return [*super().configure_callbacks(), AnswerWriter()]

    def validation_step(self, batch: Asked, index: int) -> None:
        self._evaluate(batch, index, "val")

    def test_step(self, batch: Asked, index: int) -> None:
        self._evaluate(batch, index, "test")

    def _evaluate(self, batch: Asked, index: int, stage: str) -> None:
        given = self(batch.images, batch.questions, batch.owner).argmax(1)
        score = batch.scores.gather(1, given[:, None])[:, 0]
        self.metrics[f"{stage}_all"].update(score)
        for number, name in enumerate(self.types):
            # also where the batch has none: a process that did not update would not wait for the others
            self.metrics[f"{stage}_{name}"].update(score, weight=(batch.types == number).float())
        if index == 0 and not self.trainer.sanity_checking:
            picks = [
                self._of_type(torch.nonzero(batch.owner == image)[:, 0], batch.types, image)
                for image in range(len(batch.images[:SHOWN]))
            ]
            lines = [(batch.questions[i], self._true(batch.scores[i]), self.answers[int(given[i])]) for i in picks]
            mean, std = (torch.tensor(v, device=given.device)[:, None, None] for v in (self.mean, self.std))
            show(self.trainer, batch.images[:SHOWN] * std + mean, lines, stage)

    def _of_type(self, own: Tensor, types: Tensor, image: int) -> int:
        """Which of an image's own questions to show: one of a type that goes on with each image, if there is one."""
        typed = own[types[own] == image % max(len(self.types), 1)]
        return int((typed if len(typed) else own)[0])

    def _true(self, scores: Tensor) -> str:
        return self.answers[int(scores.argmax())] if float(scores.max()) else "another answer"

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        for name in ("all", *self.types):
            metric = self.metrics[f"{stage}_{name}"]
            value = metric.compute()
            metric.reset()
            if not value.isnan():  # a type without a question
                self.log(f"{stage}/{'accuracy' if name == 'all' else name}", value, prog_bar=name == "all")

    def predict_step(self, batch: Asked, index: int) -> list[dict[str, Any]]:
        """For each question: its identifier, its text, and the likeliest answers with their probabilities."""
        scores = self(batch.images, batch.questions, batch.owner).float()
        best = (scores.sigmoid() if self.soft else scores.softmax(1)).topk(min(TOP, len(self.answers)))
        rows = zip(batch.ids, batch.questions, best.values.tolist(), best.indices.tolist())
        return [
            {"id": i, "question": q, "answers": {self.answers[a]: round(v, 4) for v, a in zip(values, numbers)}}
            for i, q, values, numbers in rows
        ]

    # -- checkpoints -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: scores mean nothing without the answers they are of."""
        checkpoint["answers"] = self.answers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook.

        Raises:
            DataError: the checkpoint's answers are not those of the data module.
        """
        if self.answers and checkpoint.get("answers", self.answers) != self.answers:
            raise DataError(
                "the checkpoint was trained with other answers than the data module has: they would be misread"
            )
