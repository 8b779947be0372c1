"""Finished runs in their folders: `version_<n>/{config.yaml, adapter/, checkpoints/{last,best}.ckpt}`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmpeft.errors import ConfigError

LAST, BEST = "last.ckpt", "best.ckpt"
CONFIG = "config.yaml"


class Place(NamedTuple):
    """Where a run lies."""

    folder: Path
    config: Path
    checkpoint: Path


class Given(NamedTuple):
    """What a command does with a finished run."""

    verb: str
    run: Path
    best: bool = False
    options: Sequence[str] = ()
    """Further ones, of the trainer."""
    paths: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    out: Path | None = None

    @property
    def has_inputs(self) -> bool:
        """Whether a user says what is to be predicted."""
        return bool(self.paths or self.texts)


def newest_checkpoint(folder: Path, name: str = LAST) -> Path | None:
    """The newest `checkpoints/<name>` of all versions of a run."""
    return max(folder.glob(f"*/checkpoints/{name}"), key=lambda path: path.stat().st_mtime, default=None)


def find_run(path: str | Path, name: str = LAST) -> Place:
    """The run at a path.

    Args:
        path: a `.ckpt` file in a run's folder, that folder, its adapter, or the folder above (its newest run is taken).
        name: which checkpoint, where the path is a folder.

    Raises:
        ConfigError: there is no checkpoint, or no `config.yaml` beside it.
    """
    path = Path(path)
    folders = [path, path.parent] if path.name == "adapter" else [path]
    tried = [folder / "checkpoints" / name for folder in folders]
    found = [*tried, newest_checkpoint(path, name)] if path.is_dir() else [path]
    checkpoint = next((file for file in found if file is not None and file.is_file()), None)
    if checkpoint is None:
        raise ConfigError(
            f"no checkpoint at {path}; expected a .ckpt file, or the folder of a run with checkpoints/{name}"
        )
    config = checkpoint.parent.parent / CONFIG
    if not config.is_file():
        raise ConfigError(f"{checkpoint} has no {config}; `mmpeft fit` writes both")
    return Place(config.parent, config, checkpoint)
