"""Tables and pictures of continual runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np
from rich.table import Table

from mmpeft.files import png_of
from mmpeft.types import Untyped
from mmpeft.vision.continual.metrics import Summary, summary
from mmpeft.vision.continual.runner import SequenceRecord

HEADER = ["method", "A_last", "Ā", "forgetting", "trained a task", "kept"]


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` in per cent; the bare value for one seed."""
    wide = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{wide}"


def by_method(records: Sequence[SequenceRecord]) -> dict[str, list[SequenceRecord]]:
    """Records of each method, in order of appearance."""
    groups: dict[str, list[SequenceRecord]] = {}
    for record in records:
        groups.setdefault(record.name, []).append(record)
    return groups


def summaries(records: Sequence[SequenceRecord]) -> list[Summary]:
    """The metrics of each run."""
    return [summary(record.square(), record.counts) for record in records]


def rows(records: Sequence[SequenceRecord]) -> list[list[str]]:
    """Cells of the table: per cent over seeds, parameters trained in the largest task, and kept at the end."""
    found = []
    for name, own in by_method(records).items():
        runs = summaries(own)
        cells = [spread([getattr(run, key) for run in runs]) for key in ("last", "average", "forgetting")]
        found.append([name, *cells, f"{own[0].trained:,}", f"{own[0].kept:,}"])
    return found


def table(records: Sequence[SequenceRecord], title: str) -> Table:
    """The comparison for a terminal."""
    out = Table(title=title)
    for i, name in enumerate(HEADER):
        out.add_column(name, justify="left" if i == 0 else "right")
    for row in rows(records):
        out.add_row(*row)
    return out


def to_markdown(records: Sequence[SequenceRecord]) -> str:
    """The comparison for a document."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(records))]) + "\n"


def heat_map(records: Sequence[SequenceRecord], title: str) -> bytes:
    """A PNG: R of every method, mean over seeds; row t is after training task t, column i is the accuracy on task i."""
    from matplotlib.figure import Figure

    groups = by_method(records)
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.8, 3.0 * lines + 0.5), dpi=120, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, squeeze=False)
    for place in axes.flat[len(groups) :]:
        place.axis("off")
    picture = None
    for place, (name, own) in zip(axes.flat, groups.items()):
        matrix = np.mean([record.square() for record in own], axis=0)
        picture = place.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        ticks = range(len(matrix))
        place.set(title=name, xticks=ticks, yticks=ticks)
        place.set_xticklabels([str(t + 1) for t in ticks])
        place.set_yticklabels([str(t + 1) for t in ticks])
        for (t, i), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                colour = "white" if value < 0.6 else "black"
                place.text(i, t, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    for place in axes[-1]:
        place.set_xlabel("accuracy on task")
    for line in axes:
        line[0].set_ylabel("after task")
    if picture is not None:
        figure.colorbar(picture, ax=axes, shrink=0.8)
    return png_of(figure)


def curves(records: Sequence[SequenceRecord], title: str) -> bytes:
    """A PNG: accuracy on all classes seen, after each task, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="tasks seen", ylabel="accuracy on all classes seen", title=title)
    axes.grid(alpha=0.3)
    marks = "os^vD<>pPX*h"
    for n, (name, own) in enumerate(by_method(records).items()):
        points = np.mean([run.curve for run in summaries(own)], axis=0)
        axes.plot(range(1, len(points) + 1), points, marker=marks[n % len(marks)], label=name)
    locator: Untyped = axes.xaxis.get_major_locator()  # matplotlib's default one, which has more to set than its base
    locator.set_params(integer=True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png_of(figure)
