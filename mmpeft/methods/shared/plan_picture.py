"""A plan as a picture: which layers and roles got how much."""

from __future__ import annotations

from collections.abc import Sequence

from mmpeft._extras import needed_by
from mmpeft.errors import ConfigError
from mmpeft.files import png_of
from mmpeft.types import Facts

MARKS = {"module": "M", "whole": "W", "entries": ""}


def label_of(name: str) -> str:
    """A tensor's name without the numbers of its layer."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def draw_plan(units: Sequence[Facts], title: str) -> bytes:
    """A PNG: a row for each role or tensor, a column for each layer, the colour its share of selected entries.

    `M` marks a module in place of entries, `W` a vector trained whole.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the plan holds no account of its units.
    """
    if not units:
        raise ConfigError("this plan holds no account of what was chosen where; it was written by hand")
    with needed_by("drawing a plan"):
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    rows = _rows(units)
    depths = sorted({unit["depth"] for unit in units})
    share = [[0.0] * len(depths) for _ in rows]
    marks: list[tuple[int, int, str]] = []
    for unit in units:
        y, x = rows.index(_row(unit)), depths.index(unit["depth"])
        share[y][x] = max(share[y][x], unit["selected"] / unit["size"])
        if MARKS.get(unit["as"]):
            marks.append((y, x, MARKS[unit["as"]]))
    low = min((value for line in share for value in line if value), default=1e-3)
    figure = Figure(figsize=(2.8 + 0.42 * len(depths), 1.3 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shown = [[value or float("nan") for value in line] for line in share]
    image = axes.imshow(shown, aspect="auto", cmap="viridis", norm=LogNorm(min(low, 0.999), 1.0))
    for y, x, mark in marks:
        color = "black" if share[y][x] > 0.2 else "white"
        axes.text(x, y, mark, ha="center", va="center", fontsize=8, color=color, fontweight="bold")
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(xlabel="layer    (M: a module instead of entries, W: trained whole)", title=title)
    axes.title.set_fontsize(9)
    figure.colorbar(image, label="share of entries selected")
    return png_of(figure, dpi=130)


def _row(unit: Facts) -> str:
    return f"{unit['tower']}: {unit['label']}" if unit["tower"] else str(unit["label"])


def _rows(units: Sequence[Facts]) -> list[str]:
    """Matrices first, as they come in a layer, then vectors."""
    matrices = dict.fromkeys(_row(unit) for unit in units if not unit["vector"])
    return list(matrices | dict.fromkeys(_row(unit) for unit in units if unit["vector"]))
