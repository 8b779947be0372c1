"""`mmpeft compare`: the same task by several methods and seeds, in one table and one plot.

The configuration is that of `mmpeft fit` (`model`, `data`, `trainer`) with three more keys: `methods` (a name for
each entry, its `method`, and whatever of the rest it overrides; `lr` for short), `seeds`, and `metric`. A finished
run is a line in `results.jsonl`; an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmpeft.bench.memory import MemoryMeter
from mmpeft.bench.report import Result, plot, table, to_markdown
from mmpeft.errors import ConfigError, nearest
from mmpeft.files import write_atomic
from mmpeft.training.cli import import_named, words
from mmpeft.training.module import TuningModule

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}
KEYS = {"model", "data", "trainer", "methods", "seeds", "metric", "title"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a comparison; `argv` starts with the sub-command."""
    parser = argparse.ArgumentParser("mmpeft compare", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--methods", help="names of entries, comma-separated; default: all")
    parser.add_argument("--seeds", help="comma-separated integers; default: those of the configuration")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv)[1:])
    if not args.config.is_file():
        raise ConfigError(f"no configuration {args.config}")
    import_named(words(["-c", str(args.config)]))
    config = read(args.config.read_text("utf-8"))
    chosen = _choose(config["methods"], args.methods)
    seeds = [int(s) for s in args.seeds.split(",")] if args.seeds else list(config.get("seeds", [0]))
    compare(config, chosen, seeds, args.out)
    return 0


def read(text: str) -> dict[str, Any]:
    """A comparison's configuration, checked for unknown and missing keys."""
    config = yaml.safe_load(text)
    if not isinstance(config, dict):
        raise ConfigError("expected a YAML mapping with model, data and methods")
    for key in config:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key!r}; keys: {', '.join(sorted(KEYS))}.{nearest(key, KEYS)}")
    for key in ("model", "data", "methods", "metric"):
        if not config.get(key):
            raise ConfigError(f"the configuration of a comparison needs {key!r}")
    return config


def _choose(methods: Mapping[str, Any], wanted: str | None) -> dict[str, Any]:
    if not wanted:
        return dict(methods)
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in methods:
            raise ConfigError(f"no entry {name!r} in methods: {', '.join(methods)}.{nearest(name, methods)}")
    return {name: methods[name] for name in names}


def compare(config: Mapping[str, Any], methods: Mapping[str, Any], seeds: Sequence[int], out: Path) -> list[Result]:
    """Run every method with every seed; write `results.jsonl`, `results.csv`, `table.md` and `plot.png` into `out`."""
    runs = {(name, seed): merged(config, entry, seed) for name, entry in methods.items() for seed in seeds}
    for run in runs.values():
        parse(run)  # every configuration error comes out before the first training step
    log = out / "results.jsonl"
    known = {r.key: r for r in _past(log)}
    results = []
    console = Console()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with _quiet(), Progress(*columns, console=console) as progress:
        task = progress.add_task("compare", total=len(runs))
        for (name, seed), run in runs.items():
            key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
            progress.update(task, description=f"{name}, seed {seed}")
            if key not in known:
                known[key] = one(run, name, seed, key, str(config["metric"]))
                lines = "".join(json.dumps(r.__dict__) + "\n" for r in known.values())
                write_atomic(log, lines.encode())
                progress.console.print(f"{name}, seed {seed}: {known[key].score:.3f} in {known[key].seconds:.0f} s")
            results.append(known[key])
            progress.advance(task)
    title = str(config.get("title", "comparison"))
    console.print(table(results, title, str(config["metric"])))
    write_atomic(out / "table.md", to_markdown(results, str(config["metric"])).encode())
    write_atomic(out / "results.csv", _csv(results).encode())
    write_atomic(out / "plot.png", plot(results, title, str(config["metric"])))
    console.print(f"table: {out / 'table.md'}\nplot:  {out / 'plot.png'}\nruns:  {out / 'results.csv'}")
    return results


def merged(config: Mapping[str, Any], entry: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The configuration of one run: the common part under an entry's own."""
    run = {key: copy.deepcopy(config.get(key, {})) for key in ("model", "data", "trainer")}
    over = {key: value for key, value in entry.items() if key not in ("method", "lr")}
    for key in over:
        if key not in run:
            raise ConfigError(f"a method's entry overrides model, data or trainer, not {key!r}.{nearest(key, run)}")
    _merge(run, over)
    arguments = run["model"].setdefault("init_args", {})
    arguments["method"] = entry["method"]
    if "lr" in entry:
        arguments.setdefault("optimizer", {"class_path": "torch.optim.AdamW"}).setdefault("init_args", {})["lr"] = (
            entry["lr"]
        )
    run["data"].setdefault("init_args", {})["seed"] = seed
    run["trainer"] = {**QUIET, **run["trainer"]}
    return run | {"seed": seed}


def _merge(into: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def parse(run: Mapping[str, Any]) -> tuple[ArgumentParser, Any]:
    """Parse one run; raises ConfigError with jsonargparse's account of what is wrong."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TuningModule, "model")
    parser.add_subclass_arguments(lightning.LightningDataModule, "data")
    parser.add_class_arguments(lightning.Trainer, "trainer")
    try:
        return parser, parser.parse_object({key: run[key] for key in ("model", "data", "trainer")})
    except Exception as error:
        raise ConfigError(f"the configuration of a run is wrong: {error}") from error


def one(run: Mapping[str, Any], name: str, seed: int, key: str, metric: str) -> Result:
    """Train and test one method with one seed."""
    lightning.seed_everything(seed, verbose=False)
    parser, config = parse(run)
    built = parser.instantiate_classes(config)
    meter = MemoryMeter()
    built.trainer.callbacks.append(meter)
    start = time.monotonic()
    built.trainer.fit(built.model, datamodule=built.data)
    seconds = time.monotonic() - start
    values = {k: float(v) for k, v in built.trainer.callback_metrics.items() if v.numel() == 1}
    values |= {k: float(v) for k, v in built.trainer.test(built.model, datamodule=built.data, verbose=False)[0].items()}
    if metric not in values:
        raise ConfigError(
            f"the task reports no metric {metric!r}; it has {', '.join(sorted(values))}.{nearest(metric, values)}"
        )
    tuning = built.model.prepare()
    head = sum(p.numel() for placed in tuning.placements if "head" in placed.home for p in placed.part.parameters())
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else meter.found.total if meter.found else 0
    trainable = sum(p.numel() for p in tuning.parameters())
    return Result(key, name, seed, values[metric], trainable, head, seconds, memory, values)


def _past(log: Path) -> list[Result]:
    return [Result(**json.loads(line)) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def _csv(results: Sequence[Result]) -> str:
    out = io.StringIO()
    columns = ["method", "seed", "score", "trainable", "head", "seconds", "memory"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(r.__dict__ for r in results)
    return out.getvalue()


class _quiet(warnings.catch_warnings):
    """No chatter of Lightning between the rows of the table."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return entered
