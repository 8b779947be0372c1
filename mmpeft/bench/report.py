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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    points = []
    for name, own in by_method(results).items():
        scores = [r.score for r in own]
        bar = stdev(scores) if len(scores) > 1 else 0
        axes.errorbar(own[0].trainable, mean(scores), yerr=bar, fmt="o", capsize=3)
        points.append((own[0].trainable, mean(scores), name))
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    step = max((high - low) / 18, 1e-3)
    taken = [(x, y) for x, y, _ in points]
    for x, y, name in sorted(points):
        above = y + step / 2
        while any(
            abs(above + step / 2 - at_y) < step and 0.3 < x / at_x < 3 for at_x, at_y in taken if (at_x, at_y) != (x, y)
        ):
            above += step / 2
        taken.append((x, above + step / 2))
        axes.annotate(name, (x, above), ha="center", va="bottom", fontsize=9)
    axes.set(xscale="log", xlabel="trained parameters, head included", ylabel=metric, title=title)
    axes.set_ylim(low - 2 * step, high + 5 * step)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
