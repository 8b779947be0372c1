"""A command line before it is parsed: the classes it names, and methods that start afresh."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from mmpeft.errors import ConfigError
from mmpeft.methods import METHODS

CONFIG = ("-c", "--config")


def words(arguments: Sequence[str]) -> set[str]:
    """Every word on the command line and in the configuration files it names.

    Raises:
        ConfigError: a file is no YAML.
    """
    files = (configuration(value) for flag, value in given(arguments) if flag in CONFIG)
    return {word for text in (*arguments, *(text for text, _ in files)) for word in re.findall(r"\w+", text)}


def given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each argument as an option and its value, `--a=b` and `--a b` alike; the other value is empty."""
    for before, argument in zip(["", *arguments], arguments):
        flag, _, value = argument.partition("=")
        yield (flag, value) if flag.startswith("-") else (before, argument)


def configuration(name: str) -> tuple[str, Any]:
    """Text and content of a configuration file; nothing for what is no file.

    Raises:
        ConfigError: it is no YAML.
    """
    if not name or not Path(name).is_file():
        return "", None
    text = Path(name).read_text("utf-8", errors="replace")
    try:
        return text, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {' '.join(str(error).split())}") from error


def afresh(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--method null` before each that names another method than the one before it.

    A parser keeps the fields that two classes have in common: DiffFit after a LoRA of attention would be one of
    attention. Only reparameterisations pass on their sites, rank and alpha, so that `--method DoRA` is the DoRA
    of a configuration's LoRA.
    """
    found: list[str] = []
    known = None
    for argument, (flag, value) in zip(arguments, given(arguments)):
        named: Any = None
        if flag in CONFIG:
            content = configuration(value)[1]
            named = content.get("method") if isinstance(content, dict) else None
        elif flag == "--method":
            named = value
        named = named.get("class_path") if isinstance(named, dict) else named
        new = METHODS.get(str(named).rpartition(".")[2])
        if new is not None:
            kinds = {cls.info.taxonomy for cls in (known, new) if cls is not None}
            if known not in (None, new) and kinds != {"reparameterized"}:
                place = len(found) if argument.startswith("-") else len(found) - 1
                found[place:place] = ["--method", "null"]
            known = new
        found.append(argument)
    return found


def domain_classes() -> dict[str, str]:
    """Class name -> module for every class of every installed domain, found in the sources without importing them."""
    found: dict[str, str] = {}
    for entry in entry_points(group="mmpeft.domains"):
        package = entry.value.partition(":")[0]
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*.py")):
                parts = path.relative_to(folder).with_suffix("").parts
                module = ".".join([package, *(part for part in parts if part != "__init__")])
                for name in re.findall(r"^class (\w+)\(", path.read_text("utf-8"), re.MULTILINE):
                    found.setdefault(name, module)
    return found


def import_named(names: Iterable[str]) -> None:
    """Import the domain modules whose classes are named, so that jsonargparse resolves `ImageClassifier` alone.

    Raises:
        ConfigError: the library of that domain is not installed.
    """
    known = domain_classes()
    for name in sorted(set(names) & set(known)):
        try:
            import_module(known[name])
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mmpeft"):
                raise
            domain = known[name].split(".")[1]
            raise ConfigError(f"{name} needs {error.name}: pip install 'mmpeft[{domain}]'") from error
