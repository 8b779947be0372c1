"""A finished run read back outside of any trainer: for commands that apply what was learned to a user's own input."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.seed import isolate_rng

from mmpeft.errors import ConfigError
from mmpeft.run.arguments import import_named, words
from mmpeft.run.cli import last_checkpoint
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.tasks.module import TuningModule


def load_run(path: str | Path) -> tuple[TuningModule, Any]:
    """The trained task in evaluation mode, and its data module with all sets filled.

    Args:
        path: a `.ckpt` file in a run's folder, that folder, or the folder above it (the newest run is taken).

    Raises:
        ConfigError: there is no checkpoint, or no `config.yaml` beside it.
    """
    path = Path(path)
    runs = [path / "checkpoints" / "last.ckpt", last_checkpoint(path)] if path.is_dir() else [path]
    checkpoint = next((file for file in runs if file is not None and file.is_file()), None)
    if checkpoint is None:
        raise ConfigError(
            f"no checkpoint at {path}; expected a .ckpt file, or the folder of a run with checkpoints/last.ckpt"
        )
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{checkpoint} has no {config}; `mmpeft fit` writes both")
    import_named(words(["-c", str(config)]))
    facts = yaml.safe_load(config.read_text("utf-8"))
    if facts.get("method"):  # the command line's own key, linked to the model's
        facts["model"].setdefault("init_args", {})["method"] = facts["method"]
    with isolate_rng():
        lightning.seed_everything(facts.get("seed_everything") or 0, verbose=False)  # as in training: a base of random
        task, data = _built(facts, config)  # weights (pretrained: false) has them again
    state = AtomicCheckpointIO().load_checkpoint(checkpoint)
    task.on_load_checkpoint(state)
    task.load_state_dict(state["state_dict"])
    return task.eval(), data


def _built(facts: dict[str, Any], config: Path) -> tuple[TuningModule, Any]:
    """Task and data of a configuration, ready to be given what was learned."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TuningModule, "model")
    parser.add_subclass_arguments(lightning.LightningDataModule, "data")
    try:
        built = parser.instantiate_classes(parser.parse_object({key: facts[key] for key in ("model", "data")}))
    except Exception as error:
        raise ConfigError(f"{config} cannot be read back: {error}") from error
    task, data = built.model, built.data
    data.setup(None)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.datamodule = data  # type: ignore[attr-defined]
    task.trainer = trainer
    task.prepare()
    return task, data
