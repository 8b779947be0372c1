"""Loggers by short name: `--trainer.logger wandb`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from mmpeft.errors import ConfigError, MissingExtraError, nearest
from mmpeft.types import Kwargs

NEEDS = {"tensorboard": "tensorboard", "csv": "", "wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}
"""Short names, and the package each wants."""


def loggers(names: Sequence[str], folder: Path, version: int | str) -> list[Logger]:
    """The loggers of a run; the first keeps its files in the run's folder.

    Without names: TensorBoard where it is installed, CSV elsewhere. Others come beside one of these.

    Raises:
        ConfigError: a name is unknown.
        MissingExtraError: what a name stands for is not installed.
    """
    for name in names:
        if name not in NEEDS:
            raise ConfigError(f"--trainer.logger {name}: known are {', '.join(NEEDS)}, or false.{nearest(name, NEEDS)}")
        if NEEDS[name] and not find_spec(NEEDS[name]):
            raise MissingExtraError(f"--trainer.logger {name} needs {NEEDS[name]}: pip install {NEEDS[name]}")
    place: Kwargs = {"save_dir": folder.parent, "name": folder.name, "version": version}
    label = f"{folder.name}-{version}"
    make: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(**place, default_hp_metric=False),
        "csv": lambda: CSVLogger(**place),
        "wandb": lambda: WandbLogger(name=label, save_dir=folder / folder_name(version), project="mmpeft"),
        "mlflow": lambda: MLFlowLogger(folder.name, run_name=label, save_dir=str(folder.parent / "mlruns")),
        "comet": lambda: CometLogger(experiment_key=None, name=label, project="mmpeft"),
    }
    local = "tensorboard" if find_spec("tensorboard") else "csv"
    chosen = [name for name in ("tensorboard", "csv") if name in names] or [local]
    return [make[name]() for name in [*chosen, *(name for name in names if name not in chosen)]]


def folder_name(version: int | str) -> str:
    """A version's folder, as Lightning's loggers call it."""
    return f"version_{version}" if isinstance(version, int) else version
