"""`Experiment`: one run as a configuration describes it, whatever command reads the configuration."""

from __future__ import annotations

import copy
from typing import ClassVar, NamedTuple

import lightning
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback

from mmpeft.errors import ConfigError
from mmpeft.run.arguments import named_in
from mmpeft.run.callbacks import LearningCurves, Outcome
from mmpeft.run.checkpoint import BestCheckpoint, RandomState
from mmpeft.run.domains import import_named
from mmpeft.run.written import spelled_out
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.tasks.module import TuningModule
from mmpeft.types import Facts, Untyped


def run_callbacks() -> list[Callback]:
    """What every run has: a random stream of its own for training steps, whatever happens between them."""
    return [RandomState()]


def reporting_callbacks() -> list[Callback]:
    """What a run has that is looked at by itself: curves, the best checkpoint, the adapter, and a table at the end."""
    return [LearningCurves(), BestCheckpoint(), Outcome()]


def parsed(parser: ArgumentParser, run: Facts, where: str = "the configuration of a run") -> Namespace:
    """A configuration by a parser that knows what the classes in it must be; nothing is built.

    Raises:
        ConfigError: a class or an argument is unknown or of the wrong type; `where` says which configuration.
    """
    import_named(named_in(run))
    try:
        config: Namespace = parser.parse_object(copy.deepcopy(dict(run)))
    except Exception as error:  # jsonargparse raises whatever a type's own check does
        raise ConfigError(f"{where} is wrong: {error}") from error
    return config


class Run(NamedTuple):
    """An experiment's objects, ready for `trainer.fit(task, datamodule=data)`."""

    task: TuningModule
    data: lightning.LightningDataModule
    trainer: lightning.Trainer


class Experiment:
    """A task, its data, a trainer and a seed, from a mapping with the keys of `mmpeft fit`.

    `method` stands beside `model` or among its arguments, as a name, a call (`LoRA(rank=8) + BitFit()`) or a class
    with its arguments. Reading finds every error of the configuration; nothing is built before `build`.
    """

    quiet: ClassVar[Facts] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    """Trainer arguments of a run that is one of many."""

    def __init__(self, parser: ArgumentParser, config: Namespace, seed: int) -> None:
        self.parser, self.config, self.seed = parser, config, seed

    @classmethod
    def read(cls, facts: Facts, where: str = "the configuration of a run") -> Experiment:
        """Parse a configuration; keys of other commands are passed over.

        Raises:
            ConfigError: a class or an argument is unknown or of the wrong type; `where` says which configuration.
        """
        run = spelled_out({key: facts.get(key) or {} for key in ("model", "data", "trainer", "method")})
        method = run.pop("method")
        if method:
            run["model"].setdefault("init_args", {})["method"] = method
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(TuningModule, "model")
        parser.add_subclass_arguments(lightning.LightningDataModule, "data")
        parser.add_class_arguments(lightning.Trainer, "trainer")
        return cls(parser, parsed(parser, run, where), int(facts.get("seed_everything") or facts.get("seed") or 0))

    def data(self) -> lightning.LightningDataModule:
        """Make the data alone."""
        own: Untyped = Namespace
        data: lightning.LightningDataModule = self.parser.instantiate_classes(own(data=self.config.data)).data
        return data

    def build(self) -> Run:
        """Make the objects, under the run's seed: a base of random weights is the same each time."""
        lightning.seed_everything(self.seed, verbose=False)
        built = self.parser.instantiate_classes(self.config)
        built.trainer.callbacks.extend(run_callbacks())
        built.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return Run(built.model, built.data, built.trainer)
