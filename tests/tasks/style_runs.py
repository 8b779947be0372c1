"""Runs of style tuning that are over in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

import mmpeft
from mmpeft.run.checkpoint import LastCheckpoint, RandomState
from mmpeft.tasks.checkpoint import AtomicCheckpointIO

LORA = mmpeft.LoRA(rank=2, at="attn.{q,v}|cross.{q,v}")


def pictures(folder: Path, count: int = 6, side: int = 16, prompt: str = "red apple") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        Image.new("RGB", (side, side), (40 * i, 90, 200 - 30 * i)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{prompt} {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def trainer(folder: Path, steps: int, *callbacks: Callback, every: int | None = 1) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=CSVLogger(folder, name="", version=""),
        plugins=[AtomicCheckpointIO()],
        callbacks=[RandomState(), LastCheckpoint(every), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
