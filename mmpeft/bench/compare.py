"""The same task by several methods and seeds, in one table and one plot; the configuration is told of in `command`."""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch
import yaml
from rich.console import Console

from mmpeft.bench.examples import KeepAnswers, answers_file, examples
from mmpeft.bench.memory import MemoryMeter
from mmpeft.bench.report import Result, best_beside, in_words, plot, table, to_markdown
from mmpeft.data.inputs import file_name
from mmpeft.errors import ConfigError, DivergedError, nearest
from mmpeft.files import only_writer, write_atomic
from mmpeft.run.experiment import Experiment
from mmpeft.run.study import choose_entries, key_of, override, quiet_progress, read_file
from mmpeft.sites import sites
from mmpeft.types import Facts, Json, Leaf

KEYS = {"model", "data", "trainer", "methods", "seeds", "metric", "title", "columns", "axes"}
RUN = ("model", "data", "trainer")
NEEDED = ("model", "data", "methods", "metric")
Setting = Json


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run a comparison; `rest` are values for its axes, and for keys of the configuration."""
    config = read_file(options.config, KEYS, NEEDED)
    if options.metric:
        config |= {"metric": options.metric, "columns": [options.metric]}
    chosen = choose_entries(config["methods"], options.methods)
    seeds = _seeds(options.seeds) if options.seeds else list(config.get("seeds", [0]))
    axes, overrides = split_options(rest)
    every = settings(config.get("axes") or {}, axes)
    compare(config, chosen, seeds, options.out, every, overrides, keep=not options.no_adapters)
    return 0


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[tuple[list[str], Leaf]]]:
    """Options for axes, and those that set a key of every run: `--trainer.max_epochs 3`.

    `--data.batch_size 8` is `--data.init_args.batch_size 8`, as for `mmpeft fit`.
    """
    axes: list[str] = []
    overrides: list[tuple[list[str], Leaf]] = []
    words = [part for argument in arguments for part in argument.split("=", 1)]
    for flag, value in zip_longest(words[::2], words[1::2]):
        path = flag.removeprefix("--").split(".")
        if path[0] not in RUN or len(path) < 2 or value is None:
            axes += [flag] if value is None else [flag, value]
            continue
        if path[0] != "trainer" and path[1] not in ("class_path", "init_args"):
            path.insert(1, "init_args")
        overrides.append((path, yaml.safe_load(value)))
    return axes, overrides


def _seeds(text: str) -> list[int]:
    """`3` is 0, 1, 2; `3,` is 3 alone."""
    try:
        given = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        given = []
    if not given or min(given) < 0 or (given == [0] and "," not in text):
        raise ConfigError(f"--seeds takes a number of seeds >= 1 or seeds with commas, as in 0,1,2; got {text!r}")
    return given if "," in text else list(range(given[0]))


def settings(axes: Mapping[str, str], arguments: Sequence[str]) -> list[Setting]:
    """Every combination of the values given for axes: `["--shots", "1,2"]` is `[{shots: 1}, {shots: 2}]`."""
    found: list[Setting] = [{}]
    words = [part for argument in arguments for part in argument.split("=", 1)]
    for flag, values in zip_longest(words[::2], words[1::2]):
        name = flag.removeprefix("--")
        if name not in axes or values is None or not flag.startswith("--"):
            known = [f"--{axis}" for axis in axes]
            hint = f"axes of the configuration: {', '.join(known) or 'none'}"
            raise ConfigError(f"{flag} is no option of a comparison, or has no values; {hint}.{nearest(flag, known)}")
        found = [{**one, name: yaml.safe_load(value)} for one in found for value in values.split(",")]
    return found


def compare(
    config: Facts,
    methods: Facts,
    seeds: Sequence[int],
    out: Path,
    every: Sequence[Setting] = ({},),
    overrides: Sequence[tuple[Sequence[str], Leaf]] = (),
    keep: bool = False,
) -> list[Result]:
    """Run every method with every seed in every setting of the axes.

    Writes `results.jsonl`, `results.csv`, `table.md` and `plot.png` into `out`, and with `keep` what each run trained
    into `adapters`. Where test samples have classes, the answers of each run go into `answers`, and `examples.png`
    shows what the first method gets wrong and the best other one right. `overrides` set keys of every run, over what
    entries say.
    """
    runs = [
        (name, seed, setting, with_values(merged(config, entry, seed, setting), overrides))
        for name, entry in methods.items()
        for setting in every
        for seed in seeds
    ]
    # every configuration error comes out before the first training step
    experiments = [Experiment.read(run, f"the configuration of {name}") for name, *_, run in runs]
    log, metric = out / "results.jsonl", str(config["metric"])
    known = {r.key: replace(r, score=r.metrics[metric]) for r in _past(log) if metric in r.metrics}
    results: list[Result] = []
    diverged: dict[str, str] = {}
    with quiet_progress(Console(), "compare", len(runs)) as (console, move):
        for (name, seed, setting, run), experiment in zip(runs, experiments):
            label = ", ".join([name, *(f"{axis} {value}" for axis, value in setting.items()), f"seed {seed}"])
            key = key_of(run)
            move(description=label)
            if key not in known:
                try:
                    folder = out / "adapters" / file_name(label) if keep else None
                    known[key] = one(experiment, name, seed, key, metric, setting, folder, answers_file(out, key))
                except DivergedError as error:  # the others are still worth comparing
                    diverged[label] = str(error).partition(". ")[0]
                    console.print(f"{label}: {diverged[label]}", markup=False)
                    move(advance=1)
                    continue
                with only_writer(out):  # another comparison may write there
                    known = {r.key: r for r in _past(log)} | known
                    lines = "".join(json.dumps(r.__dict__) + "\n" for r in known.values())
                    write_atomic(log, lines.encode())
                console.print(f"{label}: {known[key].score:.3f} in {known[key].seconds:.0f} s")
            results.append(known[key])
            move(advance=1)
    if not results:
        raise DivergedError(f"every run diverged; the first: {next(iter(diverged.items()))}")
    for label, why in diverged.items():
        console.print(f"not in the table: {label}, {why}", markup=False)
    title, columns = str(config.get("title", "comparison")), list(config.get("columns") or [metric])
    console.print(table(results, title, columns))
    write_atomic(out / "table.md", to_markdown(results, columns).encode())
    write_atomic(out / "results.csv", _csv(results).encode())
    write_atomic(out / "plot.png", plot(results, title, columns, metric))
    console.print(f"table: {out / 'table.md'}\nplot:  {out / 'plot.png'}\nruns:  {out / 'results.csv'}")
    if keep:
        console.print(f"adapters: {out / 'adapters'}")
    pair = best_beside(results, next(iter(methods)), metric)
    if pair is not None:
        baseline, best = pair
        first = next(e for (name, *_, run), e in zip(runs, experiments) if key_of(run) == baseline[0].key)
        _show_examples(out, first, baseline[0], best[0], console)
        console.print(in_words(baseline, best, metric), markup=False, highlight=False, soft_wrap=True)
    return results


def _show_examples(out: Path, experiment: Experiment, baseline: Result, best: Result, console: Console) -> None:
    """Write `examples.png`, or remove that of an earlier comparison where there are none now."""
    file = out / "examples.png"
    png = examples(out, experiment, baseline, best) if baseline.seed == best.seed else None
    if png is None:
        file.unlink(missing_ok=True)
    else:
        write_atomic(file, png)
        console.print(f"examples: {file}")


def merged(config: Facts, entry: Facts, seed: int, setting: Mapping[str, object] = {}) -> Json:
    """The configuration of one run: the common part under an entry's own, with a setting of the axes."""
    run = {key: config.get(key, {}) for key in RUN}
    over = {key: value for key, value in entry.items() if key not in ("method", "lr")}
    for key in over:
        if key not in run:
            raise ConfigError(f"a method's entry overrides model, data or trainer, not {key!r}.{nearest(key, run)}")
    run = override(run, over)
    arguments = run["model"].setdefault("init_args", {})
    if "method" in entry:
        arguments["method"] = entry["method"]
    if "lr" in entry:
        arguments.setdefault("optimizer", {"class_path": "torch.optim.AdamW"}).setdefault("init_args", {})["lr"] = (
            entry["lr"]
        )
    run["data"].setdefault("init_args", {})["seed"] = seed
    run = with_values(run, [(str(config["axes"][axis]).split("."), value) for axis, value in setting.items()])
    run["trainer"] = {**Experiment.quiet, **run["trainer"]}
    return run | {"seed": seed}


def with_values(run: Json, values: Iterable[tuple[Sequence[str], Leaf]]) -> Json:
    """The configuration of a run with values set at paths, in place."""
    for (*above, last), value in values:
        place = run
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return run


def one(
    experiment: Experiment,
    name: str,
    seed: int,
    key: str,
    metric: str,
    setting: Mapping[str, object] = {},
    folder: Path | None = None,
    answers: Path | None = None,
) -> Result:
    """Train and test one method with one seed; what was trained goes into a folder, what it answered into a file."""
    task, data, trainer = experiment.build()
    meter = MemoryMeter()
    kept = [] if answers is None else [KeepAnswers(answers)]
    trainer.callbacks += [meter, *kept]  # type: ignore[attr-defined]  # Lightning's Trainer has it, undeclared
    start = time.monotonic()
    trainer.fit(task, datamodule=data)
    seconds = time.monotonic() - start
    values = {k: float(v) for k, v in trainer.callback_metrics.items() if v.numel() == 1}
    values |= {k: float(v) for k, v in trainer.test(task, datamodule=data, verbose=False)[0].items()}
    if metric not in values:
        raise ConfigError(
            f"the task reports no metric {metric!r}; it has {', '.join(sorted(values))}.{nearest(metric, values)}"
        )
    tuning = task.prepare()
    if folder is not None:
        tuning.save(folder, inference=True)
    trainable = sum(p.numel() for _, p in task.trainable())
    beside = trainable - sum(p.numel() for p in tuning.parameters())
    heads = {site.path for site in sites(tuning.model) if site.role == "head"}
    own = (placed for placed in tuning.placements if heads & {placed.home, *(hook.path for hook in placed.hooks)})
    head = sum(p.numel() for placed in own for p in placed.part.parameters())
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else meter.found.total if meter.found else 0
    total = sum(p.numel() for p in task.parameters())
    score = values[metric]
    return Result(key, name, seed, score, trainable, head + beside, seconds, memory, values, dict(setting), total)


def _past(log: Path) -> list[Result]:
    return [Result(**json.loads(line)) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def _csv(results: Sequence[Result]) -> str:
    out = io.StringIO()
    axes, metrics = ({key: None for r in results for key in getattr(r, name)} for name in ("setting", "metrics"))
    columns = ["method", *axes, "seed", "score", "trainable", "head", "seconds", "memory", *metrics]
    writer = csv.DictWriter(out, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**r.__dict__, **r.setting, **r.metrics} for r in results)
    return out.getvalue()
