"""The sub-commands: those of the core here, those of domains in each domain's own table."""

from __future__ import annotations

from mmpeft.run import domains, export
from mmpeft.run.domains import Command

COMMANDS: dict[str, Command] = {
    "fit": Command("mmpeft.run.command:main", "train a model by a method"),
    "resume": Command("mmpeft.run.command:main", "go on with a run: mmpeft resume RUN"),
    "validate": Command("mmpeft.run.command:main", "evaluate a run on its validation data"),
    "test": Command("mmpeft.run.command:main", "evaluate a run on its test data"),
    "predict": Command("mmpeft.run.command:main", "predict pictures or texts by a run: mmpeft predict RUN PATH …"),
    "compare": Command("mmpeft.bench.command:compare", "train by several methods and put them into one table"),
    "inspect": Command("mmpeft.formats.commands:inspect_command", "describe adapter files of any known format"),
    "export": Command("mmpeft.run.export:main", "write a run or an adapter for other programs"),
    "push": Command("mmpeft.run.push:main", "upload a run's adapter to the hub, with a model card"),
    "convert": Command("mmpeft.formats.commands:convert_command", "rewrite an adapter file in another format"),
    "sites": Command(
        "mmpeft.bench.anatomy.command:main", "show where a model can be tuned, and where a method would sit"
    ),
    "configs": Command("mmpeft.run.shipped:configs", "list the configurations that ship, or print one"),
    "init": Command("mmpeft.run.shipped:init", "write a configuration to edit: mmpeft init vision/folder"),
    "models": Command("mmpeft.run.listing:models", "list tasks and backbones"),
    "data": Command("mmpeft.run.listing:data", "list data modules"),
    "methods": Command("mmpeft.run.listing:methods", "list methods: mmpeft methods '*lora*'"),
    "completion": Command("mmpeft.run.completion:main", "print a script that completes commands in your shell"),
}


FORMER = {name: Command("mmpeft.run.export:main", "now `mmpeft export`") for name in export.FORMER}
"""Sub-commands that others have replaced: they go on working, with a note."""


def all_commands() -> dict[str, Command]:
    """Name of a sub-command → where it is."""
    return {**COMMANDS, **domains.commands()}
