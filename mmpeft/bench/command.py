"""`mmpeft compare`: its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmpeft._arguments import own_arguments

ABOUT = """Train the same task by several methods and seeds; one table, one plot and, of
classes, pictures that the first method gets wrong and the best other one right. A finished run is kept: an
interrupted comparison goes on where it stopped."""
KEYS = """The configuration is that of `mmpeft fit` (model, data, trainer) with more keys: methods (a name for each
entry, its method, and whatever of the rest it overrides; lr for short), seeds, metric, further metrics to show as
columns, and axes: names for settings to go through, each the dotted path of what it sets, such as
{shots: data.init_args.shots}.

An axis is an option too, with values between commas: --shots 1,2,4. Any other key of the configuration is set for all
runs by its path: --trainer.max_epochs 3 --data.init_args.batch_size 16."""


def compare(argv: Sequence[str] | None = None) -> int:
    """`mmpeft compare`: run a comparison."""
    parser = argparse.ArgumentParser(
        "mmpeft compare", description=ABOUT, epilog=KEYS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-c", "--config", type=Path, required=True, help="a file, or a shipped configuration (`mmpeft configs`)"
    )
    parser.add_argument("--methods", help="names of entries, comma-separated; default: all")
    parser.add_argument(
        "--seeds", help="a number n for 0 … n - 1, or comma-separated seeds; default: the configuration's"
    )
    parser.add_argument("--metric", help="the score, such as val/accuracy; default: the configuration's")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    parser.add_argument("--no-adapters", action="store_true", help="do not keep what each run trained, in OUT/adapters")
    options, rest = parser.parse_known_args(own_arguments(argv))
    from mmpeft.bench.compare import run

    return run(options, rest)
