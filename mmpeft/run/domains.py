"""What the installed domains bring: tasks, data modules and commands, which are named without being imported.

A domain is a package with an entry point in the group `mmpeft.domains`. Its `__init__` has any of

- `TASKS` and `DATA`: class name → `module:Class`;
- `PARTS`: the same of further classes that a configuration names, such as heads, learners and callbacks;
- `COMMANDS`: name of a sub-command → `Command`, or (`module:function`, help);
- `EXPORTS`: format → `module:function`, what `mmpeft export` makes of the domain's runs, called with its options;
- `PIPELINE_EXPORTS`: the same for adapters whose `--pipeline` is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any, NamedTuple

from mmpeft._domains import domain_entries
from mmpeft._extras import needed_by
from mmpeft.errors import ConfigError
from mmpeft.types import Facts


class Command(NamedTuple):
    """A sub-command: `target` is `module:function`, imported when it runs and called with all arguments."""

    target: str
    help: str


def table(name: str) -> dict[str, tuple[str, Any]]:
    """The entries of a table of all domains, with the domain each is of: `{"ImageClassifier": ("vision", …)}`.

    Raises:
        ConfigError: two domains have an entry of one name.
    """
    found: dict[str, tuple[str, Any]] = {}
    for entry in domain_entries():
        own: Facts = getattr(entry.load(), name, {})
        for key, value in own.items():
            if key in found and found[key][1] != value:
                raise ConfigError(f"{key!r} is in {name} of {found[key][0]} and of {entry.name}: one must be renamed")
            found[key] = (entry.name, value)
    return found


def own_table(domain: str, name: str) -> dict[str, Any]:
    """A table of one domain."""
    return next((dict(getattr(entry.load(), name, {})) for entry in domain_entries() if entry.name == domain), {})


def classes() -> dict[str, tuple[str, str]]:
    """Class name → (domain, `module:Class`) of every task and data module, and of what they are made of."""
    return {**table("TASKS"), **table("DATA"), **table("PARTS")}


def commands() -> dict[str, Command]:
    """The sub-commands of all domains."""
    return {name: Command(*value) for name, (_, value) in table("COMMANDS").items()}


def import_named(names: Iterable[str]) -> None:
    """Import the modules of the tasks and data modules that are named, so that a parser resolves the names alone.

    Raises:
        MissingExtraError: the library of that domain is not installed.
    """
    known = classes()
    for name in sorted(set(names) & set(known)):
        domain, target = known[name]
        with needed_by(name, domain):
            import_module(target.partition(":")[0])
