"""Segmentation with an image-text pair: any class a text can name, also ones no training image shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.tasks.metrics import Metrics
from mmpeft.tasks.predictions import PredictionFolder
from mmpeft.types import AnyModule, Facts, Fields
from mmpeft.vla.fewshot.texts import ClassTexts
from mmpeft.vla.pair import PairOptions, PairTask
from mmpeft.vla.segmentation.data import BACKGROUND, IGNORED, HasUnseenClasses
from mmpeft.vla.segmentation.decoders import CLIPSegDecoder, Decoder
from mmpeft.vla.segmentation.draw import index_png, overlays
from mmpeft.vla.taps import image_taps

SHOWN = 6


class Segmenter(PairTask):
    """Trains a decoder, and by a method the image tower, on masks of seen classes; tested on seen and unseen ones.

    A pixel belongs to the class of the highest score if the scores of all sum to more than `threshold`, else to none:
    unsure which class it is, it still shows something. Reported are the mean
    intersection over union of all, of seen and of unseen classes, and the harmonic mean hIoU of the last two; a class
    that is nowhere and was found nowhere does not count.

    Batches are `(images float [B, 3, H, W], class numbers int64 [B, H, W])` with 254 for background and 255 for what
    does not count; to predict, `(images, identifiers, heights and widths [B, 2])`.
    """

    text: Tensor

    monitor = ("val/mIoU", "max")

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        decoder: Decoder | None = None,
        template: str = "a photo of a {}.",
        threshold: float | None = 0.5,
        **options: Unpack[PairOptions],
    ) -> None:
        """
        Args:
            backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
            method: what is trained of the image tower and how; none for the decoder alone.
            decoder: `CLIPSegDecoder` or `SANDecoder`.
            template: text around a class name.
            threshold: sum of scores below which a pixel belongs to no class; None where each pixel has one, as in
                ADE20K.
            options: those of `PairTask`.

        Raises:
            ConfigError: the threshold is no score in (0, 1).
        """
        super().__init__(backbone, method, **options)
        if threshold is not None and not 0 < threshold < 1:
            raise ConfigError(f"threshold is a score in (0, 1) or None, got {threshold}")
        self.template, self.threshold = template, threshold
        self.decoder = decoder or CLIPSegDecoder()
        self.classes: list[str] = []
        self.unseen = 0

    def build(self) -> nn.Module:
        data = self.data(HasUnseenClasses)
        if data is not None:
            self.classes, self.unseen = list(data.classes), int(data.unseen)
        return super().build()

    def start(self) -> None:
        pair: AnyModule = self.model
        self.taps = image_taps(pair)
        size = self.preprocessing.size
        text = self.encode(self.classes or ["thing"])
        self.decoder.start(self.taps, text.shape[1], size[0] // self.taps.grid(size)[0])
        visual = {id(p) for p in pair.visual.parameters()}
        self.live = any(p.requires_grad and id(p) not in visual for p in pair.parameters())
        if not self.live:  # the text tower says the same in every step
            self.register_buffer("text", text.detach(), persistent=False)
        count = len(self.classes) + 1
        self.iou: Metrics[MulticlassJaccardIndex] = Metrics(
            {f"{stage}_iou": overlap(count) for stage in ("val", "test")}
        )

    def encode(self, classes: Sequence[str]) -> Tensor:
        """Unit text features [C, e] of class names, any that the text tower can read."""
        assert self.model is not None
        assert self.tuning is not None
        found = ClassTexts(classes, [self.template], self.tokenizer, self.tuning)
        return found.encode(self.model).float()

    def texts(self) -> Tensor:
        """Unit text features [C, e] of the data's classes; encoded anew where the method tunes the text tower."""
        self.prepare()
        return self.encode(self.classes) if self.live else self.text

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """Scores [B, C, H, W] in [0, 1] for unit text features [C, e], by default those of the data's classes."""
        self.prepare()
        scores: Tensor = self.decoder(self.taps, images, self.texts() if text is None else text)
        return scores

    def segment(self, scores: Tensor) -> Tensor:
        """Class numbers [B, H, W]; C for none."""
        number = scores.argmax(1)
        if self.threshold is None:
            return number
        return number.masked_fill(scores.sum(1) <= self.threshold, scores.shape[1])

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, target = batch
        seen = len(self.classes) - self.unseen
        hidden = (target >= seen) & (target < BACKGROUND)
        target = target.masked_fill(hidden, IGNORED)
        loss = self.decoder.loss(self.taps, images, self.texts()[:seen], target)
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        images, target = batch
        found = self.segment(self(images))
        truth = target.masked_fill(target == BACKGROUND, len(self.classes))
        self.iou[f"{stage}_iou"].update(found, truth)
        return truth, found

    def results(self, stage: str) -> Mapping[str, Tensor]:
        metric = self.iou[f"{stage}_iou"]
        iou: Tensor = metric.compute()[: len(self.classes)]
        metric.reset()
        return means(iou, self.unseen)

    def draw(self, batch: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], stage: str) -> Mapping[str, bytes]:
        seen = len(self.classes) - self.unseen
        names = [name if i < seen else f"{name} (unseen)" for i, name in enumerate(self.classes)]
        pictures = self.preprocessing.restore(batch[0][:SHOWN])
        return {"masks": overlays(pictures, [masks[:SHOWN] for masks in found], names)}

    def meaning(self) -> Facts:
        return {"classes": self.classes}

    @property
    def names(self) -> Sequence[str]:
        """What predictions look for: the texts that were given with the pictures, else the data's classes."""
        return self.asked_texts() or self.classes

    def predict_step(self, batch: tuple[Tensor, Sequence[str], Tensor], index: int) -> Fields:
        """Identifiers, pictures in [0, 1] and class numbers at each picture's own size, which become files."""
        images, names, sizes = batch
        whole = [tuple(size) for size in sizes.tolist()]
        asked = self.names != self.classes
        scores = self(images, self.encode(self.names) if asked else None).float()
        pictures = self.preprocessing.restore(images)
        return {
            "id": list(names),
            "pictures": [F.interpolate(p[None], s, mode="bilinear").cpu() for p, s in zip(pictures, whole)],
            "masks": [self.segment(F.interpolate(f[None], s, mode="bilinear")).cpu() for f, s in zip(scores, whole)],
        }

    def files(self, outputs: Facts) -> Iterator[tuple[str, bytes]]:
        """The picture with its segments, and the class numbers, for each prediction."""
        for name, picture, mask in zip(outputs["id"], outputs["pictures"], outputs["masks"]):
            yield f"{name}.png", overlays(picture, [mask], self.names)
            yield f"{name}_classes.png", index_png(mask[0], len(self.names))

    def note(self) -> str:
        """What is said beside the folder of predictions."""
        return f"(number {len(self.names)}: none)"

    def configure_callbacks(self) -> list[Callback]:
        return [
            *super().configure_callbacks(),
            PredictionFolder("segments", self.files, self.note),
        ]


def overlap(classes: int) -> MulticlassJaccardIndex:
    """Intersection over union of each class, NaN for one that is nowhere and was found nowhere."""
    return MulticlassJaccardIndex(
        classes, average=None, ignore_index=IGNORED, zero_division=math.nan, validate_args=False
    )


def means(iou: Tensor, unseen: int) -> dict[str, Tensor]:
    """`mIoU`; with unseen classes, the last ones of [C], also `seen`, `unseen` and `hIoU = 2 / (1/seen + 1/unseen)`."""
    seen = len(iou) - unseen
    found = {"mIoU": iou.nanmean(), "seen": iou[:seen].nanmean()}
    if unseen:
        found["unseen"] = iou[seen:].nanmean()
        both = torch.stack([found["seen"], found["unseen"]]).clamp(min=1e-8)
        found["hIoU"] = 2 / both.reciprocal().sum()
    return found
