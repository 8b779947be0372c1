"""A tiny random classifier and data that a test can see through, for everything around the training loop."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from torch.utils.data import TensorDataset

import mmpeft
from mmpeft.data.loading import DataModule
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.vision.classification.task import ImageClassifier

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
BACKBONE = "vit_tiny_patch16_224"


class TinyData(DataModule):
    """Noise images with a brightness for each of four classes."""

    def __init__(self, samples: int = 32, batch_size: int = 8, shift: int = 0, seed: int = 0, size: int = 32) -> None:
        super().__init__(batch_size, 0, seed)
        self.samples, self.shift, self.size = samples, shift, size
        self.classes = [f"class {i}" for i in range(4)]
        self.num_classes = 4
        self.configured: tuple[Any, ...] = ()

    def configure(self, image_size: Any, mean: Any, std: Any) -> None:
        self.configured = (image_size, mean, std)

    def datasets(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(self.samples) % 4
        images = torch.randn(self.samples, 3, self.size, self.size, generator=generator) + labels.view(-1, 1, 1, 1)
        self.train_set = TensorDataset(images, labels + self.shift)
        self.val_set = self.test_set = TensorDataset(images[:16], labels[:16] + self.shift)
        self.predict_set = [(images[i], f"image{i}.png") for i in range(10)]  # type: ignore[assignment]


def classifier(method: mmpeft.methods.Method | None = None, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    options = {"backbone": BACKBONE, "pretrained": False, "model_args": SMALL, **options}
    return ImageClassifier(method=method or mmpeft.LoRA(rank=2), **options)


def trainer(folder: Any, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **quiet, **options}
    return Trainer(default_root_dir=folder, plugins=[AtomicCheckpointIO()], **options)


def weights(module: ImageClassifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
