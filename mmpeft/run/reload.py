"""A finished run read back outside of any trainer: for commands that apply what was learned to a user's own input."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch.utilities.seed import isolate_rng

from mmpeft.run.experiment import Experiment
from mmpeft.run.place import LAST, find_run
from mmpeft.run.stranger import guarded, read_config
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.tasks.module import TuningModule
from mmpeft.types import Untyped


def load_run(path: str | Path, name: str = LAST) -> tuple[TuningModule, Untyped]:
    """The trained task in evaluation mode, and its data module with all sets filled.

    Args:
        path: a `.ckpt` file in a run's folder, that folder, or the folder above it (the newest run is taken).
        name: which checkpoint of a folder: `last.ckpt` or `best.ckpt`.

    Raises:
        ConfigError: there is no checkpoint, or no `config.yaml` beside it, or that names classes that nobody registers:
            a run may come from somebody else, and is data.
    """
    _, config, checkpoint = find_run(path, name)
    facts = read_config(config)
    quiet = {**Experiment.quiet, "accelerator": "cpu"}
    with isolate_rng(), guarded(config) as check:
        experiment = Experiment.read({**facts, "trainer": quiet}, where=str(config))
        check(experiment.config)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.WARNING)
        task, data, trainer = experiment.build()
        data.setup(None)  # type: ignore[arg-type]  # of our data modules None stands for every stage
        trainer.datamodule = data  # type: ignore[attr-defined]  # as Lightning's loops set it
        task.trainer = trainer
        task.prepare()
    state = AtomicCheckpointIO().load_checkpoint(checkpoint)
    task.on_load_checkpoint(state)
    task.load_state_dict(state["state_dict"])
    return task.eval(), data
