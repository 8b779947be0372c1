"""What the sub-commands' parsers share; no library is imported to show a command's help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def own_arguments(argv: Sequence[str] | None) -> list[str]:
    """What follows the name of the sub-command; None stands for the command line."""
    return list(sys.argv[1:] if argv is None else argv)[1:]


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def comma_separated(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
