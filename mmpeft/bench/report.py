"""Tables and plots of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from statistics import mean, stdev
from typing import TYPE_CHECKING

from rich.table import Table

from mmpeft.files import png_of
from mmpeft.types import Json, Leaf

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Result:
    """One run: `trainable` counts the head's `head` parameters too, `memory` is in bytes."""

    key: str
    method: str
    seed: int
    score: float
    trainable: int
    head: int
    seconds: float
    memory: int
    metrics: dict[str, float] = field(default_factory=dict)
    setting: Json = field(default_factory=dict)
    """Values of the axes of the comparison."""
    total: int = 0
    """All parameters of the tuned model, trained or not; 0 in results of earlier versions."""


def grouped(results: Sequence[Result]) -> dict[tuple[Leaf, ...], list[Result]]:
    """Results of each method in each setting, over seeds, in order of appearance."""
    groups: dict[tuple[Leaf, ...], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, *result.setting.values()), []).append(result)
    return groups


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` over seeds; the bare value for one seed, a dash where a run has none."""
    if len(values) == 0:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def values_of(own: Sequence[Result], metric: str) -> list[float]:
    """A metric of each run that has it."""
    return [r.metrics[metric] for r in own if not isnan(r.metrics.get(metric, nan))]


def best_beside(results: Sequence[Result], baseline: str, metric: str) -> tuple[list[Result], list[Result]] | None:
    """Runs of the baseline and of the best other method, in the setting where that is best; None without either.

    Methods that train every parameter stand back where others do not: they are what the others are to come near.
    """
    groups = {key: [r for r in own if not isnan(r.score)] for key, own in grouped(results).items()}
    pairs = [
        (groups[baseline, *setting], own)
        for (name, *setting), own in groups.items()
        if name != baseline and own and groups.get((baseline, *setting))
    ]
    pairs = [pair for pair in pairs if pair[1][0].trainable != pair[1][0].total] or pairs
    sign = -1 if lower_is_better(metric) else 1
    return max(pairs, key=lambda pair: sign * mean(r.score for r in pair[1]), default=None)


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good: losses and errors."""
    return metric.rpartition("/")[2].endswith(("loss", "error", "rel", "rmse"))


def in_words(baseline: Sequence[Result], best: Sequence[Result], metric: str) -> str:
    """One line: the best method's score and share of trained parameters, against the baseline's score."""
    before, after = ([r.score for r in own] for own in (baseline, best))
    first, setting = best[0], "".join(f", {axis} {value}" for axis, value in best[0].setting.items())
    share = f", with {_percent(first.trainable / first.total)} % of the parameters" if first.total else ""
    line = f"{first.method} {spread(after)} against {spread(before)} of {baseline[0].method} ({metric}{setting}){share}"
    gain = (mean(after) - mean(before)) * (-1 if lower_is_better(metric) else 1)
    if gain <= 0:
        return f"no method is better than {baseline[0].method}: {line}"
    if len(after) > 1 and len(before) > 1 and gain <= stdev(after) + stdev(before):
        return f"within the spread of the seeds: {line}"
    return line


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share >= 0.001 else f"{100 * share:.1g}"


def rows(results: Sequence[Result], columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: metrics, trained parameters in the backbone and beside it, seconds, memory of a step."""
    seeds = sorted({r.seed for r in results})
    over = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    names = [metric.rpartition("/")[2] for metric in columns]
    header = ["method", *results[0].setting, f"{names[0]}, {over}", *names[1:], "tuned", "head", "s", "MiB"]
    cells = [
        [
            *map(str, key),
            *(spread(values_of(own, metric)) for metric in columns),
            f"{own[0].trainable - own[0].head:,}",
            f"{own[0].head:,}",
            f"{mean(r.seconds for r in own):.0f}",
            f"{own[0].memory / 2**20:.0f}",
        ]
        for key, own in grouped(results).items()
    ]
    return header, cells


def table(results: Sequence[Result], title: str, columns: Sequence[str]) -> Table:
    """The comparison for a terminal."""
    header, cells = rows(results, columns)
    out = Table(title=title)
    for i, name in enumerate(header):
        out.add_column(name, justify="left" if i == 0 else "right")
    for row in cells:
        out.add_row(*row)
    return out


def to_markdown(results: Sequence[Result], columns: Sequence[str]) -> str:
    """The comparison for a document; memory as counted for one training step."""
    header, cells = rows(results, columns)
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def plot(results: Sequence[Result], title: str, columns: Sequence[str], metric: str) -> bytes:
    """A PNG: metrics along the first axis of the comparison, or the score against trained parameters."""
    axis = next(iter(results[0].setting), None)
    several = axis is not None and len({r.setting[axis] for r in results}) > 1
    figure = along(results, title, columns, str(axis)) if several else against_parameters(results, title, metric)
    return png_of(figure)


def against_parameters(results: Sequence[Result], title: str, metric: str) -> Figure:
    """Score against trained parameters (log scale), one point a method, bars over seeds."""
    from adjustText import adjust_text
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    seeds = len({r.seed for r in results})
    over = f", mean ± deviation over {seeds} seeds" if seeds > 1 else ""
    axes.set(xscale="log", xlabel="trained parameters, head included", ylabel=metric + over, title=title)
    axes.margins(x=0.3, y=0.15)
    axes.grid(alpha=0.3)
    names, xs, ys = [], [], []
    for (name, *_), own in grouped(results).items():
        scores = [r.score for r in own if not isnan(r.score)]
        if not scores:
            continue
        size, score = max(own[0].trainable, 1), mean(scores)
        bar = stdev(scores) if len(scores) > 1 else 0.0
        axes.errorbar(size, score, yerr=bar, fmt="o", capsize=3)
        names.append(axes.text(size, score, name, fontsize=9))
        xs += [size] * 3
        ys += [score - bar, score, score + bar]
    adjust_text(names, xs, ys, ax=axes, expand=(1.2, 1.6))
    return figure


def along(results: Sequence[Result], title: str, columns: Sequence[str], axis: str) -> Figure:
    """One panel a metric, one line a method along an axis of the comparison, bands of one deviation over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(columns) + 1.7, 4.5), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    ticks = list(dict.fromkeys(r.setting[axis] for r in results))
    for panel, metric in zip(panels, columns):
        panel.set(xlabel=axis, title=metric.rpartition("/")[2], xticks=range(len(ticks)), xticklabels=map(str, ticks))
        panel.grid(alpha=0.3)
        for number, name in enumerate(dict.fromkeys(r.method for r in results)):
            at = [values_of([r for r in results if r.method == name and r.setting[axis] == t], metric) for t in ticks]
            points = [(x, mean(v), stdev(v) if len(v) > 1 else 0.0) for x, v in enumerate(at) if v]
            if not points:
                continue
            x, y, bar = zip(*points)
            style = {"color": colormaps["tab20"](number % 20), "linestyle": ("-", "--", ":")[number % 3]}
            panel.plot(x, y, marker="o", markersize=3, label=name, **style)
            panel.fill_between(
                x, [a - b for a, b in zip(y, bar)], [a + b for a, b in zip(y, bar)], alpha=0.08, color=style["color"]
            )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    figure.suptitle(title)
    return figure
