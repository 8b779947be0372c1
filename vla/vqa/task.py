"""Visual question answering with an image-text pair: both towers, a fusion transformer, a vocabulary of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Unpack

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmpeft.errors import ConfigError, Refused
from mmpeft.methods.base import Method
from mmpeft.parts.in_place import InPlace
from mmpeft.tasks.metrics import Metrics
from mmpeft.tasks.options import TrainingOptions
from mmpeft.tasks.predictions import PredictionFile
from mmpeft.tasks.taps import Taps
from mmpeft.types import AnyModule, Facts, Fields
from mmpeft.vla.pair import PairTask
from mmpeft.vla.taps import image_taps, projection, text_taps
from mmpeft.vla.vqa.data import Asked, HasAnswers
from mmpeft.vla.vqa.draw import answered
from mmpeft.vla.vqa.model import Fusion, SharedSpace

SHOWN = 8
TOP = 3


class QuestionOptions(TrainingOptions, total=False):
    """Options of `PairTask`, but for `image_size`."""

    pretrained: bool


class VisualQuestions(PairTask):
    """Trains a fusion transformer, and by a method the towers, to answer questions about images.

    The loss is `−log softmax(z)_a` of the one true answer; where several are right to a degree s (VQAv2), it is
    `Σ_a BCE(σ(z_a), s_a)`. Reported is the mean score of the answers given, over all questions and by type.
    """

    monitor = ("val/accuracy", "max")
    headline = ("accuracy",)

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        fusion: Fusion | None = None,
        image_size: int | None = 128,
        **options: Unpack[QuestionOptions],
    ) -> None:
        """
        Args:
            backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
            method: what is trained of the towers and how; none for the fusion transformer alone.
            fusion: its size, and whether it is blind to the image.
            image_size: height and width in pixels; None for the pair's own.
            options: those of `PairTask`.
        """
        super().__init__(backbone, method, image_size=image_size, **options)
        self.fusion = fusion or Fusion()
        self.answers: list[str] = []
        self.types: list[str] = []
        self.soft = False

    def build(self) -> nn.Module:
        data = self.data(HasAnswers)
        if data is not None:
            self.answers, self.types, self.soft = list(data.answers), list(data.types), bool(data.soft)
        if not self.answers:
            raise ConfigError(f"{type(data).__name__} names no answers; VisualQuestions chooses among them")
        return super().build()

    def start(self) -> None:
        assert self.tuning is not None
        if any(isinstance(p.part, InPlace) for p in self.tuning.placements):
            raise Refused(f"{self.method} puts learned tokens in the place of the question's words; take others")
        pair: AnyModule = self.model
        self.image, self.text = image_taps(pair), text_taps(pair)
        grid, joint = self.image.grid(self.preprocessing.size), None
        with suppress(Refused):  # of a tower that pools by attention, single patches are not in the joint space
            joint = projection(pair)(torch.zeros(1, 1, self.image.width)).shape[-1]
        self.joint = joint is not None
        self.fusion.start(self.image, self.text, grid, len(self.answers), joint)
        names = [f"{s}_{k}" for s in ("val", "test") for k in ("all", *self.types)]
        self.metrics: Metrics[MeanMetric] = Metrics({name: MeanMetric() for name in names})

    def forward(self, images: Tensor, questions: Sequence[str], owner: Tensor | None = None) -> Tensor:
        """Scores [Q, A] of the answers, before the softmax, for Q questions about images [B, 3, H, W].

        `owner` int64 [Q] says which image a question is about; without it, each has one question.
        """
        self.prepare()
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
                joint = SharedSpace(F.normalize(projection(self.model)(patches), dim=-1), F.normalize(whole, dim=-1))
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
        return [*super().configure_callbacks(), PredictionFile("answers.jsonl", lambda lines, suffix: lines)]

    def evaluate(self, batch: Asked, stage: str) -> Tensor:
        given: Tensor = self(batch.images, batch.questions, batch.owner).argmax(1)
        score = batch.scores.gather(1, given[:, None])[:, 0]
        self.metrics[f"{stage}_all"].update(score)
        for number, name in enumerate(self.types):
            # also where the batch has none: a process that did not update would not wait for the others
            self.metrics[f"{stage}_{name}"].update(score, weight=(batch.types == number).float())
        return given

    def draw(self, batch: Asked, found: Tensor, stage: str) -> Mapping[str, bytes]:
        picks = [
            self._of_type(torch.nonzero(batch.owner == image)[:, 0], batch.types, image)
            for image in range(len(batch.images[:SHOWN]))
        ]
        lines = [(batch.questions[i], self._true(batch.scores[i]), self.answers[int(found[i])]) for i in picks]
        return {"answers": answered(self.preprocessing.restore(batch.images[:SHOWN]), lines)}

    def _of_type(self, own: Tensor, types: Tensor, image: int) -> int:
        """Which of an image's own questions to show: one of a type that goes on with each image, if there is one."""
        typed = own[types[own] == image % max(len(self.types), 1)]
        return int((typed if len(typed) else own)[0])

    def _true(self, scores: Tensor) -> str:
        return self.answers[int(scores.argmax())] if float(scores.max()) else "another answer"

    def results(self, stage: str) -> Mapping[str, Tensor]:
        found = {}
        for name in ("all", *self.types):
            metric = self.metrics[f"{stage}_{name}"]
            value: Tensor = metric.compute()
            metric.reset()
            if not value.isnan():  # a type without a question
                found["accuracy" if name == "all" else name] = value
        return found

    def predict_step(self, batch: Asked, index: int) -> list[Fields]:
        """For each question: its identifier, its text, and the likeliest answers with their probabilities."""
        scores = self(batch.images, batch.questions, batch.owner).float()
        best = (scores.sigmoid() if self.soft else scores.softmax(1)).topk(min(TOP, len(self.answers)))
        rows = zip(batch.ids, batch.questions, best.values.tolist(), best.indices.tolist())
        return [
            {"id": i, "question": q, "answers": {self.answers[a]: round(v, 4) for v, a in zip(values, numbers)}}
            for i, q, values, numbers in rows
        ]

    def meaning(self) -> Facts:
        return {"answers": self.answers}
