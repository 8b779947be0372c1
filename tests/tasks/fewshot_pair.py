"""A tiny pair, a tokenizer of letters and coloured noise, for everything around few-shot recognition."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from open_clip.model import CLIP
from torch import Tensor

from mmpeft.data.images import ImageData, Pairs
from mmpeft.vla.fewshot.data import FewShotData
from mmpeft.vla.fewshot.heads import Head
from mmpeft.vla.fewshot.task import FewShot
from tests.matrix.example import enliven

WORDS = 200
NAMES = ["cat", "dog", "red car", "tree"]
CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 20, "vocab_size": WORDS, "width": 24, "heads": 3, "layers": 3},
}


class Letters:
    """A tokenizer of letters: start, one number a letter of the alphabet, end (the highest), padding."""

    context_length = 20

    def __call__(self, texts: Any, context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        n = context_length or self.context_length
        rows = [[WORDS - 2, *(1 + ord(c) % 100 for c in text.strip()), WORDS - 1][:n] for text in texts]
        return torch.tensor([row + [0] * (n - len(row)) for row in rows])


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*args: Any, **kwargs: Any) -> CLIP:
        torch.manual_seed(0)
        model = CLIP(**CFG)
        enliven(model)
        return model

    for module in ("mmpeft.vla.pair",):
        monkeypatch.setattr(f"{module}.create", make)
        monkeypatch.setattr(f"{module}.tokenizer", lambda name: Letters())
    return make


class Blobs(ImageData):
    """Coloured noise, one colour a class."""

    def __init__(self, per_class: int = 8, classes: tuple[str, ...] = tuple(NAMES), seed: int = 0) -> None:
        super().__init__(batch_size=4, augment="none")
        self.classes, self.per_class = list(classes), per_class

    def datasets(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(len(self.classes)).repeat_interleave(self.per_class)
        colours = torch.randint(0, 200, (len(self.classes), 3, 1, 1), generator=generator)
        for name in ("train", "test"):
            noise = torch.randint(0, 56, (len(labels), 3, 32, 32), generator=generator)
            setattr(self, f"{name}_set", Pairs((colours[labels] + noise).to(torch.uint8), labels))


def data(**options: Any) -> FewShotData:
    return FewShotData(Blobs(), **{"shots": 2, "batch_size": 4, "augment": "none", **options})


def fit(task: FewShot, source: FewShotData, epochs: int = 1, callbacks: list[Callback] | None = None) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir="/nonexistent",
    )
    trainer.fit(task, datamodule=source)
    return trainer


def ready(head: Head | None = None, method: Any = None, **options: Any) -> FewShot:
    task = FewShot("tiny", method, head, templates=["a {}."], **options)
    task.classes, task.base = list(NAMES), 2
    task.prepare()
    return task.eval()
