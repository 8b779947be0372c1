"""What the commands share that run many experiments: a configuration with entries, seeds, keys to resume by, quiet."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmpeft.errors import ConfigError, nearest
from mmpeft.run.shipped import find_config
from mmpeft.types import Argument, Facts, Json

Mappings = Json


def read_file(path: Path, keys: Collection[str], needed: Sequence[str]) -> Mappings:
    """A study's configuration, a file or a shipped one by name, checked as `read_text` does.

    Raises:
        ConfigError: there is no such configuration, or its content is wrong.
    """
    return read_text(find_config(str(path)).read_text("utf-8"), keys, needed)


def read_text(text: str, keys: Collection[str], needed: Sequence[str]) -> Mappings:
    """A study's configuration, checked for unknown and missing keys.

    Raises:
        ConfigError: it is no YAML mapping, has a key that is not among `keys`, or lacks one that is needed.
    """
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"expected a YAML mapping with {', '.join(needed)}")
    for key in config:
        if key not in keys:
            raise ConfigError(f"unknown key {key!r}; keys: {', '.join(sorted(keys))}.{nearest(str(key), keys)}")
    for key in needed:
        if not config.get(key):
            raise ConfigError(f"the configuration needs {key!r}")
    return config


def choose_entries(entries: Facts, wanted: str | None) -> Mappings:
    """The entries named, with commas between, in that order; all of them for None.

    Raises:
        ConfigError: one is not there.
    """
    names = [name.strip() for name in wanted.split(",")] if wanted else list(entries)
    for name in names:
        if name not in entries:
            raise ConfigError(f"no entry {name!r} in methods: {', '.join(entries)}.{nearest(name, entries)}")
    return {name: entries[name] for name in names}


def override(common: Facts, own: Facts) -> Mappings:
    """A configuration with another laid over it, mapping by mapping."""
    merged = copy.deepcopy(dict(common))
    for key, value in own.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict):
            merged[key] = override(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def key_of(run: Facts) -> str:
    """A name for all that a run depends on: the same run has the same key, and is not made twice."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def quiet_progress(console: Console, title: str, total: int) -> Iterator[tuple[Console, Callable[..., None]]]:
    """A bar over many runs and a console to print above it, without Lightning's chatter in between.

    The function given moves the bar: `move(description="LoRA, seed 0")`, `move(advance=1)`.
    """
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), Progress(*columns, console=console) as progress:
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        bar = progress.add_task(title, total=total)

        def move(**how: Argument) -> None:
            progress.update(bar, **how)

        try:
            yield progress.console, move
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
