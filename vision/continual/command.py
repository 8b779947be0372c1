"""Learning a sequence of tasks by several methods and seeds; a finished run is not made twice."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from mmpeft.data.images import ImageData
from mmpeft.errors import ConfigError, nearest
from mmpeft.files import write_atomic
from mmpeft.run.experiment import parsed
from mmpeft.run.study import choose_entries, key_of, quiet_progress, read_file
from mmpeft.types import Facts, Json, Untyped
from mmpeft.vision.continual import report
from mmpeft.vision.continual.learner import Learner
from mmpeft.vision.continual.runner import ContinualClassifier, SequenceRecord

KEYS = {"run", "data", "methods", "seeds", "title"}
NEEDED = ("run", "data", "methods")


def run(options: argparse.Namespace) -> int:
    """Run the sequence by every method and seed."""
    config = read_file(options.config, KEYS, NEEDED)
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else list(config.get("seeds", [1993]))
    sequence(config, choose_entries(config["methods"], options.methods), seeds, options.out)
    return 0


def merged(config: Facts, entry: Facts, seed: int) -> Json:
    """The configuration of one run: the common part under an entry's own."""
    run = {"run": copy.deepcopy(config["run"]), "data": copy.deepcopy(config["data"])}
    for key in entry:
        if key not in ("learner", *run):
            raise ConfigError(
                f"a method's entry has learner, run or data, not {key!r}.{nearest(key, ['learner', *run])}"
            )
    if "learner" not in entry:
        raise ConfigError("a method's entry needs its learner, such as {class_path: SimpleCIL}")
    run["run"].update(entry.get("run", {}))
    run["run"].setdefault("order", seed)
    run["run"]["seed"] = seed
    run["data"].setdefault("init_args", {}).update({**entry.get("data", {}), "seed": seed})
    return {"learner": copy.deepcopy(entry["learner"]), **run}


def parse(run: Facts) -> tuple[ArgumentParser, Untyped]:
    """Parse one run; raises ConfigError with jsonargparse's account of what is wrong."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Learner, "learner")
    parser.add_subclass_arguments(ImageData, "data")
    parser.add_class_arguments(ContinualClassifier, "run", skip={"learner", "data"}, instantiate=False)
    return parser, parsed(parser, run)


def build(run: Facts) -> ContinualClassifier:
    """The classifier that a run's configuration describes."""
    parser, config = parse(run)
    options = config.run.as_dict()
    built = parser.instantiate_classes(config)
    return ContinualClassifier(learner=built.learner, data=built.data, **options)


def sequence(config: Facts, methods: Facts, seeds: Sequence[int], out: Path) -> list[SequenceRecord]:
    """Run every method with every seed; write `results.json`, `table.md`, `matrices.png` and `curves.png`."""
    runs = {(name, seed): merged(config, entry, seed) for name, entry in methods.items() for seed in seeds}
    for run in runs.values():
        parse(run)  # every configuration error comes out before the first training step
    console, records = Console(), []
    with quiet_progress(console, "continual", len(runs)) as (above, move):
        for (name, seed), run in runs.items():

            def tell(text: str, label: str = f"{name}, seed {seed}") -> None:
                move(description=f"{label}, {text}")

            folder = out / f"{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"
            record = build(run).run(folder, key_of(run), name, tell)
            last = report.summaries([record])[0]
            above.print(
                f"{name}, seed {seed}: last {last.last:.3f}, average {last.average:.3f} in {record.seconds:.0f} s"
            )
            records.append(record)
            move(advance=1)
    title = str(config.get("title", "class-incremental learning"))
    console.print(report.table(records, title))
    facts = [r.__dict__ | {"metrics": s.__dict__} for r, s in zip(records, report.summaries(records))]
    write_atomic(out / "results.json", (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(out / "table.md", report.to_markdown(records).encode())
    write_atomic(out / "matrices.png", report.heat_map(records, title))
    write_atomic(out / "curves.png", report.curves(records, title))
    console.print(f"table:    {out / 'table.md'}\nmatrices: {out / 'matrices.png'}\nruns:     {out / 'results.json'}")
    return records
