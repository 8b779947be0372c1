"""A command line before it is parsed: the classes it names, and methods that start afresh."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import yaml

from mmpeft.errors import ConfigError
from mmpeft.methods import METHODS
from mmpeft.run.shipped import find_config
from mmpeft.run.written import as_class, is_call, read_method
from mmpeft.types import Leaf

CONFIG = ("-c", "--config")
SECTIONS = ("model", "data", "methods", "learner")
"""Parts of a configuration whose values may be class names without `class_path`."""


def class_names(arguments: Sequence[str]) -> set[str]:
    """The names of classes on the command line and in the configuration files it names.

    Raises:
        ConfigError: a file is no YAML.
    """
    found = set()
    for flag, value in options_of(arguments):
        if flag in CONFIG:
            found |= named_in(configuration(value))
        elif value.startswith(("{", "[")):
            found |= named_in(_flow(value), inside=True)
        else:
            found.add(value.rpartition(".")[2])
    return found


def _flow(text: str) -> object:
    """A value that is written as a mapping or a list; nothing where it is neither, which the parser says."""
    try:
        content: object = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return content


def named_in(content: object, inside: bool = False) -> set[str]:
    """The names of classes in a configuration: each `class_path`, and values in the sections that hold classes."""
    if isinstance(content, str):
        return {content.rpartition(".")[2]} if inside else set()
    if isinstance(content, list):
        return {name for item in content for name in named_in(item, inside)}
    if not isinstance(content, dict):
        return set()
    return {
        name
        for key, value in content.items()
        for name in named_in(value, inside or key in SECTIONS or key == "class_path")
    }


def options_of(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each argument as an option and its value, `--a=b` and `--a b` alike; the other value is empty."""
    for before, argument in zip(["", *arguments], arguments):
        flag, _, value = argument.partition("=")
        yield (flag, value) if flag.startswith("-") else (before, argument)


def with_found_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the file in place of the name of each shipped configuration: `-c vision/demo`.

    Raises:
        ConfigError: a name is neither a file nor a shipped configuration.
    """
    found = []
    for argument, (flag, value) in zip(arguments, options_of(arguments)):
        if flag in CONFIG and value:
            argument = argument.removesuffix(value) + str(find_config(value))
        found.append(argument)
    return found


def with_short_loggers(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """The arguments, with `--logger wandb` for `--trainer.logger wandb`: the trainer's own takes classes alone."""
    found = list(arguments)
    for place, (argument, (flag, value)) in enumerate(zip(arguments, options_of(arguments))):
        if flag == "--trainer.logger" and value and set(value.split(",")) <= set(names):
            if argument == value:
                found[place - 1] = "--logger"
            else:
                found[place] = f"--logger={value}"
    return found


def configuration(name: str) -> Leaf:
    """Content of a configuration file; None for what is no file.

    Raises:
        ConfigError: it is no YAML.
    """
    if not name or not Path(name).is_file():
        return None
    try:
        return yaml.safe_load(Path(name).read_text("utf-8", errors="replace"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {' '.join(str(error).split())}") from error


def reset_changed_methods(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--method null` before each that names another method than the one before it.

    A parser keeps the fields that two classes have in common: DiffFit after a LoRA of attention would be one of
    attention. Only reparameterisations pass on their sites, rank and alpha, so that `--method DoRA` is the DoRA
    of a configuration's LoRA. A method that is written as a call is itself alone.
    """
    kept: list[str] = []
    known = None
    for argument, (flag, value) in zip(arguments, options_of(arguments)):
        named: Leaf = None
        call = False
        if flag in CONFIG:
            content = configuration(value)
            named = content.get("method") if isinstance(content, dict) else None
        elif flag == "--method":
            named, call = value, is_call(value)
        if is_call(named):
            named = as_class(read_method(named))
        if call:
            argument = f"--method={json.dumps(named)}" if argument.startswith("-") else json.dumps(named)
        named = named.get("class_path") if isinstance(named, dict) else named
        new = METHODS.get(str(named).rpartition(".")[2])
        if new is not None:
            kinds = {cls.info.taxonomy for cls in (known, new) if cls is not None}
            if known is not None and (call or (known is not new and kinds != {"reparameterized"})):
                place = len(kept) if argument.startswith("-") else len(kept) - 1
                kept[place:place] = ["--method", "null"]
            known = new
        kept.append(argument)
    return kept
