"""The command `mmpeft`: finds the sub-command without importing torch, then hands over."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from mmpeft import __version__
from mmpeft._extras import needed_by
from mmpeft.errors import MMPEFTError, nearest
from mmpeft.run import domains
from mmpeft.run.domains import Command

COMMANDS: dict[str, Command] = {
    "fit": Command("mmpeft.run.command:main", "train a model by a method"),
    "resume": Command("mmpeft.run.command:main", "go on with a run: mmpeft resume RUN"),
    "validate": Command("mmpeft.run.command:main", "evaluate a run on its validation data"),
    "test": Command("mmpeft.run.command:main", "evaluate a run on its test data"),
    "predict": Command("mmpeft.run.command:main", "predict pictures or texts by a run: mmpeft predict RUN PATH …"),
    "compare": Command("mmpeft.bench.command:compare", "train by several methods and put them into one table"),
    "inspect": Command("mmpeft.formats.commands:inspect_command", "describe adapter files of any known format"),
    "export": Command("mmpeft.formats.commands:export_command", "write an adapter in another tool's format, verified"),
    "convert": Command("mmpeft.formats.commands:convert_command", "rewrite an adapter file in another format"),
    "merge": Command("mmpeft.formats.commands:merge_command", "write a whole model with an adapter merged in"),
    "sites": Command(
        "mmpeft.bench.anatomy.command:main", "show where a model can be tuned, and where a method would sit"
    ),
    "configs": Command("mmpeft.run.shipped:configs", "list the configurations that ship, or print one"),
    "init": Command("mmpeft.run.shipped:init", "write a configuration to edit: mmpeft init vision/folder"),
    "methods": Command("mmpeft.cli:methods", "list the methods, or those a wildcard names: mmpeft methods '*lora*'"),
}
"""Commands of the core; those of domains stand in each domain's own table."""

USAGE = """usage: mmpeft <command> [options]

Parameter-efficient fine-tuning. Commands:
{commands}
  --version  print the version

Examples:
  mmpeft fit -c vision/emoji -c method/lora --method.rank 16
  mmpeft fit -c vision/emoji --method BitFit --trainer.max_epochs 3
  mmpeft resume runs/EmojiData-LoRA
  mmpeft predict runs/EmojiData-LoRA my_pictures --out predictions.csv
  mmpeft inspect adapter_folder pytorch_lora_weights.safetensors
  mmpeft sites vit_base_patch16_224 --method 'LoRA(rank=8)' --picture sites.png

`mmpeft <command> --help` lists a command's options; `mmpeft fit --method.help LoRA` those of a method."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; return the exit code (2 for what the user can mend)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"mmpeft {__version__}")
        return 0
    name = arguments[0] if arguments else "--help"
    try:
        known = COMMANDS if name in COMMANDS else {**COMMANDS, **domains.commands()}
        if name in ("-h", "--help", "help"):
            width = max(map(len, known)) + 2
            print(USAGE.format(commands="\n".join(f"  {name:<{width}} {c.help}" for name, c in known.items())))
            return 0
        if name not in known:
            raise MMPEFTError(f"unknown command {name!r}; commands: {', '.join(known)}.{nearest(name, known)}")
        module, _, function = known[name].target.partition(":")
        with needed_by(f"`mmpeft {name}`", module):
            code = getattr(import_module(module), function)(None if argv is None else arguments)
        return int(code or 0)
    except MMPEFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def methods(argv: Sequence[str] | None = None) -> int:
    """Print the registered methods as a table."""
    from rich.console import Console
    from rich.table import Table

    from mmpeft.methods import METHODS, list_methods

    patterns = (sys.argv[1:] if argv is None else list(argv))[1:] or ["*"]
    if patterns[0] in ("-h", "--help"):
        print("usage: mmpeft methods [pattern ...]")
        return 0
    names = sorted({name for pattern in patterns for name in list_methods(pattern)})
    if not names:
        raise MMPEFTError(f"no method matches {' '.join(patterns)!r}.{nearest(patterns[0].strip('*'), METHODS)}")
    table = Table("method", "kind", "mergeable", "same at start", "paper")
    for name in names:
        info = METHODS[name].info
        flags = ("yes" if flag else "no" for flag in (info.mergeable, info.identity))
        table.add_row(name, info.taxonomy, *flags, info.paper)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
