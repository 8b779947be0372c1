"""`mmpeft fit | resume | validate | test | predict`: help, and runs that are named by their folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmpeft.errors import ConfigError
from mmpeft.run.help import ABOUT, text_of
from mmpeft.run.place import Given


def main(argv: Sequence[str] | None = None) -> int:
    """Show the help, or hand over to the trainer; `argv` starts with the sub-command."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb, own = words[0], words[1:]
    whole = [word for word in own if word in ("--help", "-h")] and "all" not in own
    if whole:
        print(text_of(verb))
        return 0
    if "all" in own and ("--help" in own or "-h" in own):
        words = ["fit" if verb == "resume" else verb, "--help"]
    elif verb == "resume" or (own and not own[0].startswith("-")):
        given = read_given(verb, own)
        from mmpeft.run.cli import of_run

        return of_run(given)
    from mmpeft.run.cli import main as run

    return run(words if argv is not None or words[1:] == ["--help"] else None)


def read_given(verb: str, words: Sequence[str]) -> Given:
    """A finished run and what is to be done with it.

    Raises:
        ConfigError: no run is named, there is nothing to predict, or what would be written is there.
    """
    parser = argparse.ArgumentParser(f"mmpeft {verb}", usage=ABOUT[verb].usage, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--best", action="store_true")
    if verb == "predict":
        parser.add_argument("given", nargs="*")
        parser.add_argument("--text", nargs="+", default=[])
        parser.add_argument("--out", type=Path)
    if not words or words[0].startswith("-"):
        raise ConfigError(f"which run? {ABOUT[verb].usage}")
    options, rest = parser.parse_known_args(list(words))
    if verb != "predict":
        return Given(verb, options.run, options.best, rest)
    if options.out is not None and options.out.exists():
        raise ConfigError(f"--out {options.out} is there already; name another, or remove it")
    if options.out is not None and not (options.given or options.text):
        raise ConfigError("--out is for what you give: mmpeft predict RUN PATH… --out FILE")
    return Given(verb, options.run, options.best, rest, (*options.given,), (*options.text,), options.out)
