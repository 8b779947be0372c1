"""What is recorded of a former run and compared: its outputs, and the names of today's readers in one place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm import create_model
from torch import Tensor, nn

from mmpeft.training.run import load_run

HERE = Path(__file__).parent
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def vit() -> nn.Module:
    """A ViT of two blocks; its weights are in `adapters/base.safetensors`."""
    model: nn.Module = create_model("vit_tiny_patch16_224", **VIT)
    return model.eval()


def images() -> Tensor:
    """Two images for it."""
    return torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)


def reload(folder: Path) -> tuple[Any, Any]:
    """Task and data of a finished run."""
    return load_run(folder)


@torch.no_grad()
def outputs(task: Any, data: Any) -> dict[str, Tensor]:
    """What a task says of the first images of its test set."""
    return dict(_OUTPUTS[type(task).__name__](task, next(iter(data.test_dataloader()))))


def _scores(task: Any, batch: Any) -> Iterator[tuple[str, Tensor]]:
    yield "scores", task(batch[0][:2])


def _masks(task: Any, batch: Any) -> Iterator[tuple[str, Tensor]]:
    yield "scores", task(batch[0][:1])[..., ::8, ::8].contiguous()


def _answers(task: Any, batch: Any) -> Iterator[tuple[str, Tensor]]:
    own = batch.owner == 0
    questions = [text for text, kept in zip(batch.questions, own.tolist()) if kept]
    yield "scores", task(batch.images[:1], questions, batch.owner[own])


def _features(task: Any, batch: Any) -> Iterator[tuple[str, Tensor]]:
    images, texts, _ = batch
    yield from zip(("image", "text"), task.encode(images[:2], task.tokens(texts[:2])))


def _drawing(task: Any, batch: Any) -> Iterator[tuple[str, Tensor]]:
    yield "drawing", task.draw(batch["prompt"][:1])[..., ::2, ::2].contiguous()
    yield "base", task.draw(batch["prompt"][:1], share=0.0)[..., ::2, ::2].contiguous()


_OUTPUTS = {
    "ImageClassifier": _scores,
    "FewShot": _scores,
    "Segmenter": _masks,
    "VisualQuestions": _answers,
    "ContrastiveTuner": _features,
    "StyleTuner": _drawing,
}
