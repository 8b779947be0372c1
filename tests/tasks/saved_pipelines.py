"""Tiny pipelines with an adapter beside them, and what they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import mmpeft
from mmpeft.diffusion.families import family_of
from tests.support.moved import attach_moved
from tests.tasks.tiny_pipelines import pipeline

LORA = mmpeft.LoRA(rank=2, at="attn.{q,k,v,out}|cross.{q,k,v,out}", alpha=4)


def saved(kind: str, folder: Path, method: Any = LORA, seed: int = 0) -> Path:
    """The folder of an adapter for a tiny pipeline, which is saved beside it."""
    made = pipeline(kind)
    if not (folder / kind).is_dir():
        made.save_pretrained(folder / kind)
    return attach_moved(family_of(made).denoiser, method, by=0.3, seed=seed).save(folder / f"adapter{seed}")


def drawn(made: Any, kind: str) -> torch.Tensor:
    family = family_of(made)
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        return family.draw(["a cat", "red apple"], noise, 2, 3.0, family.size)
