"""The commands of this domain: their options. What they do is imported once the options are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmpeft._arguments import own_arguments


def continual(argv: Sequence[str] | None = None) -> int:
    """`mmpeft continual`: a sequence of tasks by several methods and seeds, in one table and a heat map of each matrix.

    The configuration has `run` (arguments of ContinualClassifier), `data`, `seeds`, and `methods`: a name for each
    entry, its `learner`, and whatever of `run` and `data` it overrides. The seed of a run is also the seed of its class
    order unless `run` has `order`. Each run is a folder below --out; an interrupted one goes on after its last finished
    task.
    """
    parser = argparse.ArgumentParser("mmpeft continual", description=continual.__doc__)
    parser.add_argument(
        "-c", "--config", type=Path, required=True, help="a file, or a shipped configuration (`mmpeft configs`)"
    )
    parser.add_argument("--methods", help="names of entries, comma-separated; default: all")
    parser.add_argument("--seeds", help="comma-separated integers; default: those of the configuration")
    parser.add_argument("--out", type=Path, default=Path("runs/continual"), help="default: %(default)s")
    options = parser.parse_args(own_arguments(argv))
    from mmpeft.vision.continual.command import run

    return run(options)
