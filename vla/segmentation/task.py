"""Segmentation with an image-text pair: any class a text can name, also ones no training image shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Frozen
from mmpeft.recompute import Recompute
from mmpeft.training.module import TuningModule
from mmpeft.tuning import Tuning
from mmpeft.vla.backbone import create, preprocessing, tokenizer
from mmpeft.vla.data.segmentation import BACKGROUND, IGNORED
from mmpeft.vla.fewshot.texts import ClassTexts
from mmpeft.vla.segmentation.decoders import CLIPSegDecoder, Decoder
from mmpeft.vla.segmentation.picture import overlays
from mmpeft.vla.taps import Taps, grid_of

SHOWN = 6


class Segmenter(TuningModule):
    """Trains a decoder, and by a method the image tower, on masks of seen classes; tested on seen and unseen ones.

    A pixel belongs to the class of the highest score if that is above `threshold`, else to none. Reported are the mean
    intersection over union of all, of seen and of unseen classes, and the harmonic mean hIoU of the last two.
    """

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        decoder: Decoder | None = None,
        pretrained: bool = True,
        template: str = "a photo of a {}.",
        threshold: float = 0.5,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        lr_scheduler: LRSchedulerCallable | None = None,
        recompute: Recompute = None,
        compile: bool = False,
        image_size: int | None = 128,
    ) -> None:
        """Args:
        backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
        method: what is trained of the image tower and how; none for the decoder alone.
        decoder: `CLIPSegDecoder` or `SANDecoder`.
        pretrained: whether to load the pair's weights.
        template: text around a class name.
        threshold: score below which a pixel belongs to no class.
        optimizer: any torch optimiser, given everything that trains.
        warmup: share of all steps with a linear rise of the learning rate; cosine decay to zero follows.
        lr_scheduler: a scheduler in place of warm-up and cosine, stepped after each optimiser step.
        recompute: what blocks compute again in the backward pass: nothing, `pointwise` operations, or `block`.
        compile: compile every block with torch.compile.
        image_size: height and width in pixels; None for the pair's own.
        """
        method = method or Frozen()
        super().__init__(method, optimizer, warmup, recompute, compile, train_head=False, lr_scheduler=lr_scheduler)
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold is a score in (0, 1), got {threshold}")
        self.backbone, self.pretrained, self.image_size = backbone, pretrained, image_size
        self.template, self.threshold = template, threshold
        self.decoder = decoder or CLIPSegDecoder()
        self.classes: list[str] = []
        self.unseen = 0

    def build(self) -> nn.Module:
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            self.classes, self.unseen = list(data.classes), int(data.unseen)
        model = create(self.backbone, self.pretrained, self.image_size)
        if data is not None:
            data.configure(*preprocessing(model))
        return model

    def prepare(self) -> Tuning:
        first = self.tuning is None
        tuning = super().prepare()
        if first:
            model: Any = self.model
            self.taps = Taps(model)
            size, self.mean, self.std = preprocessing(model)
            with torch.no_grad():
                probe = self.taps(torch.zeros(1, 3, *size), [len(self.taps.paths) - 1])
            patches = next(iter(probe.values())).shape[1] - self.taps.prefix
            text = self.encode(self.classes or ["thing"])
            self.decoder.start(self.taps, text.shape[1], size[0] // grid_of(patches, size)[0])
            self.register_buffer("text", text, persistent=False)
            count = len(self.classes) + 1
            iou = {s: MulticlassJaccardIndex(count, average=None, ignore_index=IGNORED) for s in ("val", "test")}
            self.iou = nn.ModuleDict({f"{stage}_iou": metric for stage, metric in iou.items()})
        return tuning

    @torch.no_grad()
    def encode(self, classes: list[str]) -> Tensor:
        """Unit text features [C, e] of class names."""
        assert self.model is not None
        assert self.tuning is not None
        found = ClassTexts(classes, [self.template], tokenizer(self.backbone), self.tuning)
        return found.encode(self.model).float()

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """Scores [B, C, H, W] in [0, 1] for unit text features [C, e], by default those of the data's classes."""
        self.prepare()
        scores: Tensor = self.decoder(self.taps, images, self.text if text is None else text)
        return scores

    def segment(self, scores: Tensor) -> Tensor:
        """Class numbers [B, H, W]; C for none."""
        best, number = scores.max(1)
        return torch.where(best > self.threshold, number, scores.shape[1])

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, target = batch
        seen = len(self.classes) - self.unseen
        hidden = (target >= seen) & (target < BACKGROUND)
        target = target.masked_fill(hidden, IGNORED)
        loss = self.decoder.loss(self.taps, images, self.text[:seen], target)
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, index, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, index, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], index: int, stage: str) -> None:
        images, target = batch
        found = self.segment(self(images))
        truth = target.masked_fill(target == BACKGROUND, len(self.classes))
        self.iou[f"{stage}_iou"].update(found, truth)
        if index == 0 and not self.trainer.sanity_checking:
            self._show(images[:SHOWN], truth[:SHOWN], found[:SHOWN], stage)

    def _show(self, images: Tensor, truth: Tensor, found: Tensor, stage: str) -> None:
        """Images, truths and predictions to the logger and as a PNG in the run's folder."""
        if self.logger is None or not self.trainer.is_global_zero:
            return
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        picture = overlays(images * std + mean, [truth, found], self.classes)
        name = f"{stage}_{self.trainer.current_epoch:03d}" if stage == "val" else stage
        write_atomic(Path(self.trainer.log_dir or ".") / "masks" / f"{name}.png", picture)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        iou = self.iou[f"{stage}_iou"].compute()[: len(self.classes)]
        self.iou[f"{stage}_iou"].reset()
        seen = len(self.classes) - self.unseen
        found = {"mIoU": iou.mean(), "seen": iou[:seen].mean()}
        if self.unseen:
            found["unseen"] = iou[seen:].mean()
            both = torch.stack([found["seen"], found["unseen"]]).clamp(min=1e-8)
            found["hIoU"] = 2 / both.reciprocal().sum()
        self.log_dict({f"{stage}/{key}": value for key, value in found.items()}, prog_bar=True)
