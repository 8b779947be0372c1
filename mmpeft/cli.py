"""The command `mmpeft`: finds the sub-command without importing torch, then hands over."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from mmpeft import __version__
from mmpeft._extras import needed_by
from mmpeft.errors import MMPEFTError, nearest
from mmpeft.run.commands import COMMANDS, FORMER, all_commands
from mmpeft.run.quiet import quieten

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
    quieten()
    try:
        known = {**COMMANDS, **FORMER} if name in COMMANDS or name in FORMER else all_commands()
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


if __name__ == "__main__":
    sys.exit(main())
