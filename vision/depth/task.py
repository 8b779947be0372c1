"""Depth from one image: a timm backbone, any method, a decoder over its blocks."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmpeft.data.contract import configure
from mmpeft.errors import DataError
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Frozen
from mmpeft.tasks.decoders import DenseDecoder
from mmpeft.tasks.metrics import Metrics
from mmpeft.tasks.options import TrainingOptions
from mmpeft.tasks.predictions import PredictionFolder
from mmpeft.tasks.taps import Taps
from mmpeft.tasks.task import Task
from mmpeft.vision.backbone import create, normalisation
from mmpeft.vision.depth.draw import depth_png

SHOWN = 6
VARIANCE = 0.85
"""λ of the loss; 1 would not see a wrong scale of the whole image."""


class DepthEstimator(Task):
    """Trains a decoder, and by a method the backbone, to tell how far away each pixel is.

    The decoder gives `log d`. With `e = log d − log d*` over all pixels, the loss is `√(mean e² − λ (mean e)²)`
    (Eigen et al., arXiv:1406.2283). Reported are `rel = mean |d − d*| / d*`, `rmse`, and `delta1`, the share of pixels
    with `max(d / d*, d* / d) < 1.25`. Batches are `(images float [B, 3, H, W], depth float [B, 1, H, W])`.
    """

    monitor = ("val/rel", "min")
    headline = ("rel", "delta1")

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        decoder: DenseDecoder | None = None,
        pretrained: bool = True,
        image_size: int | None = 128,
        **options: Unpack[TrainingOptions],
    ) -> None:
        """
        Args:
            backbone: a timm name, a local folder, or `embedded:<name>`; one that sees a sequence of patches.
            method: what is trained of the backbone and how; none for the decoder alone.
            decoder: what is behind the backbone.
            pretrained: whether to load the backbone's weights.
            image_size: height and width in pixels; None for the backbone's own.
            options: those of `TuningModule`.
        """
        super().__init__(method or Frozen(), train_head=False, **options)
        self.backbone, self.pretrained, self.image_size = backbone, pretrained, image_size
        self.decoder = decoder or DenseDecoder()

    def build(self) -> nn.Module:
        size = {} if self.image_size is None else {"img_size": self.image_size}
        model = create(self.backbone, num_classes=0, pretrained=self.pretrained, **size)
        self.preprocessing = normalisation(model)
        configure(self.datamodule, self.preprocessing)
        return model

    def start(self) -> None:
        assert self.model is not None
        self.taps = Taps(self.model)
        self.decoder.start(self.taps, 1, self.preprocessing.size)
        names = [f"{stage}_{name}" for stage in ("val", "test") for name in ("rel", "square", "delta1")]
        self.metrics: Metrics[MeanMetric] = Metrics({name: MeanMetric() for name in names})

    def forward(self, images: Tensor) -> Tensor:
        """Depth [B, 1, H, W], positive."""
        self.prepare()
        depth: Tensor = self.decoder(self.taps, images).float().exp()
        return depth

    def check(self, batch: tuple[Tensor, Tensor]) -> None:
        images, depth = batch
        if depth.shape != (len(images), 1, *images.shape[-2:]) or not bool((depth > 0).all()):
            raise DataError(
                f"expected a positive depth for each pixel of images {list(images.shape)}, got {list(depth.shape)} "
                f"from {float(depth.min())}"
            )

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, depth = batch
        error = (self(images).log() - depth.log()).flatten(1)
        loss: Tensor = (error.square().mean(1) - VARIANCE * error.mean(1).square()).clamp(min=1e-8).sqrt().mean()
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, depth = batch
        found: Tensor = self(images)
        ratio = torch.maximum(found / depth, depth / found)
        self.metrics[f"{stage}_rel"].update((found - depth).abs() / depth)
        self.metrics[f"{stage}_square"].update((found - depth).square())
        self.metrics[f"{stage}_delta1"].update((ratio < 1.25).float())
        return found

    def results(self, stage: str) -> Mapping[str, Tensor]:
        rel, square, delta1 = (self.metrics[f"{stage}_{name}"] for name in ("rel", "square", "delta1"))
        values: dict[str, Tensor] = {"rel": rel.compute(), "rmse": square.compute().sqrt(), "delta1": delta1.compute()}
        for metric in (rel, square, delta1):
            metric.reset()
        return values

    def draw(self, batch: tuple[Tensor, Tensor], found: Tensor, stage: str) -> Mapping[str, bytes]:
        images, depth = (side[:SHOWN] for side in batch)
        maps = {"truth": depth, "prediction": found[:SHOWN]}
        return {"depth": depth_png(self.preprocessing.restore(images), maps)}

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], index: int) -> dict[str, Any]:
        """Names, images in [0, 1] and depth, which become files."""
        images, names = batch
        return {"id": list(names), "images": self.preprocessing.restore(images).cpu(), "depth": self(images).cpu()}

    def files(self, outputs: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """A picture and a NumPy array [H, W] for each prediction."""
        for name, image, depth in zip(outputs["id"], outputs["images"], outputs["depth"]):
            array = io.BytesIO()
            np.save(array, depth[0].numpy())
            yield f"{name}.npy", array.getvalue()
            yield f"{name}.png", depth_png(image[None], {"depth": depth[None]})

    def configure_callbacks(self) -> list[Callback]:
        return [*super().configure_callbacks(), PredictionFolder("depth", self.files, lambda: "(.npy: depth [H, W])")]
