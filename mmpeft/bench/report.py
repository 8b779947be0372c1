"""Tables and plots of comparisons."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from rich.table import Table


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


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each method, in order of appearance."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.method, []).append(result)
    return groups


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` over seeds; the bare value for one seed."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def rows(results: Sequence[Result], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: score, trained parameters in the backbone and in the head, seconds, memory of a step."""
    seeds = sorted({r.seed for r in results})
    name = metric.rpartition("/")[2]
    header = ["method", f"{name}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"]
    header += ["tuned", "head", "s", "MiB"]
    cells = [
        [
            name,
            spread([r.score for r in own]),
            f"{own[0].trainable - own[0].head:,}",
            f"{own[0].head:,}",
            f"{mean(r.seconds for r in own):.0f}",
            f"{own[0].memory / 2**20:.0f}",
        ]
        for name, own in by_method(results).items()
    ]
    return header, cells


def table(results: Sequence[Result], title: str, metric: str) -> Table:
    """The comparison for a terminal."""
    header, cells = rows(results, metric)
    out = Table(title=title)
    for i, name in enumerate(header):
        out.add_column(name, justify="left" if i == 0 else "right")
    for row in cells:
        out.add_row(*row)
    return out


def to_markdown(results: Sequence[Result], metric: str) -> str:
    """The comparison for a document; memory as counted for one training step."""
    header, cells = rows(results, metric)
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def plot(results: Sequence[Result], title: str, metric: str) -> bytes:
    """A PNG: score against trained parameters (log scale), one point a method, bars over seeds."""
    from adjustText import adjust_text
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="trained parameters, head included", ylabel=metric, title=title)
    axes.margins(x=0.3, y=0.15)
    axes.grid(alpha=0.3)
    names, xs, ys = [], [], []
    for name, own in by_method(results).items():
        scores = [r.score for r in own]
        size, score = own[0].trainable, mean(scores)
        bar = stdev(scores) if len(scores) > 1 else 0.0
        axes.errorbar(size, score, yerr=bar, fmt="o", capsize=3)
        names.append(axes.text(size, score, name, fontsize=9))
        xs += [size] * 3
        ys += [score - bar, score, score + bar]
    adjust_text(names, xs, ys, ax=axes, expand=(1.2, 1.6))
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
