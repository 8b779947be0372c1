"""`mmpeft push RUN user/repository`: a run's adapter on the hub, with a card that says what the run knows of it."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from mmpeft._arguments import own_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Upload what a run has trained; `argv` starts with the sub-command."""
    parser = argparse.ArgumentParser("mmpeft push", description="Upload a run's adapter to the hub, with a model card.")
    parser.add_argument("run", type=Path, help="a run's folder or .ckpt file")
    parser.add_argument("repository", help="user/repository; made where it is not there")
    parser.add_argument("--best", action="store_true", help="the checkpoint of the best validation")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--data", default="", help="what it was trained on, for the card (default: the data module)")
    parser.add_argument("--license", default="", help="of the adapter, for the card")
    options = parser.parse_args(own_arguments(argv))
    from mmpeft.run.place import BEST, LAST, find_run
    from mmpeft.run.reload import load_run

    name = BEST if options.best else LAST
    place = find_run(options.run, name)
    task, data = load_run(place.checkpoint)
    address = task.prepare().push_to_hub(
        options.repository,
        base_model=getattr(task, "backbone", "") or getattr(task, "source", ""),
        data=options.data or type(data).__name__,
        scores=_scores(place.folder / "curves.csv"),
        license=options.license,
        private=options.private,
    )
    print(address)
    return 0


def _scores(curves: Path) -> dict[str, float]:
    """The last validation in a run's curves."""
    if not curves.is_file():
        return {}
    with curves.open(newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v and k.startswith("val/")} for row in csv.DictReader(file)]
    return next((row for row in reversed(rows) if row), {})
