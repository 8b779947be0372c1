"""`mmpeft completion SHELL`: a script that completes commands, options and names in bash, zsh and fish."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

from mmpeft._arguments import own_arguments
from mmpeft.formats.forms import FORMATS
from mmpeft.run.commands import all_commands
from mmpeft.run.domains import table
from mmpeft.run.help import GROUPS
from mmpeft.run.shipped import shipped

HOW = """in bash    eval "$(mmpeft completion bash)"
in zsh     autoload -U +X bashcompinit && bashcompinit; eval "$(mmpeft completion zsh)"
in fish    mmpeft completion fish | source"""
_BASH = """_mmpeft() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{commands}" -- "$word")); return; fi
  case "$before" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "{options}" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _mmpeft mmpeft"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script of a shell."""
    parser = argparse.ArgumentParser(
        "mmpeft completion",
        description="Print a script that completes mmpeft's commands, options and names.",
        epilog=HOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(own_arguments(argv)).shell
    print(_fish() if shell == "fish" else _bash())
    return 0


def _options() -> list[str]:
    """The options that the short help of `fit` explains."""
    return [name.split()[0] for options in GROUPS.values() for name, _ in options]


def _values() -> Mapping[str, list[str]]:
    """What may follow an option."""
    own = [path.read_text("utf-8") for name, path in shipped().items() if name.startswith("method/")]
    methods = {name for text in own for name in re.findall(r"class_path: (\w+)", text)}
    return {
        "-c": list(shipped()),
        "--model": sorted(table("TASKS")),
        "--data": sorted(table("DATA")),
        "init": list(shipped()),
        "show": list(shipped()),
        "--method": sorted(methods),
        "--to": list(FORMATS),
    }


def _bash() -> str:
    cases = "\n".join(
        f'    {option}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word") $(compgen -f -- "$word")); return ;;'
        for option, words in _values().items()
    )
    return _BASH.format(commands=" ".join(all_commands()), cases=cases, options=" ".join(_options()))


def _fish() -> str:
    lines = ["complete -c mmpeft -n __fish_use_subcommand -f -a '" + " ".join(all_commands()) + "'"]
    for option in _options():
        known = " ".join(_values().get(option, ()))
        name = option.lstrip("-")
        flag = f"-s {name}" if option.startswith("-") and not option.startswith("--") else f"-l {name}"
        lines.append(f"complete -c mmpeft {flag}" + (f" -x -a '{known}'" if known else ""))
    return "\n".join(lines)
