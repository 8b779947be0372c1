"""A model as a picture: towers side by side, blocks that are alike drawn once, and a method's sites marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmpeft._extras import needed_by
from mmpeft.bench.anatomy.fit import Fit
from mmpeft.bench.anatomy.layout import (
    BETWEEN,
    COLORS,
    GAP,
    HIGH,
    LETTERS,
    NAMES,
    PAD,
    PER_ROW,
    STRIP,
    TOP,
    WIDE,
    BlockGroup,
    Box,
    Column,
    Layout,
)
from mmpeft.bench.anatomy.overview import Line, Overview
from mmpeft.bench.anatomy.table import shape_text
from mmpeft.files import png_of
from mmpeft.types import Untyped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(found: Overview, fitted: Fit | None = None) -> bytes:
    """A PNG of a model's anatomy; with a method, its sites with how many parameters each trains in all.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return png_of(figure_of(found, fitted), dpi=130, facecolor="white")


def figure_of(found: Overview, fitted: Fit | None = None) -> Figure:
    """The same as a figure of matplotlib."""
    with needed_by("drawing a model"):
        from matplotlib.figure import Figure
    layout = Layout(found, fitted)
    width = 0.3 + len(layout.columns) * (WIDE + STRIP + BETWEEN)
    height = max(column.height for column in layout.columns) + TOP + 0.75
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    _Drawing(axes, found, fitted, layout).on(width)
    return figure


class _Drawing:
    def __init__(self, axes: Untyped, found: Overview, fitted: Fit | None, layout: Layout) -> None:
        self.axes, self.found, self.fitted, self.layout = axes, found, fitted, layout
        self.places: dict[str, tuple[float, float, float, float]] = {}
        """Left, right, top and bottom of each tower's blocks."""
        self.crossings: list[tuple[Column, Box, float, float]] = []

    def on(self, width: float) -> None:
        """Draw everything."""
        title = f"{self.found.name}: {self.found.cls}, {self.found.parameters:,} parameters"
        self.axes.text(0.3, 0.36, title, fontsize=_size(title, width - 0.6, 13.0), fontweight="bold", va="center")
        under = self._subtitle()
        self.axes.text(0.3, 0.68, under, fontsize=_size(under, width - 0.6, 10.0), va="center", color="#444444")
        for number, column in enumerate(self.layout.columns):
            self._draw_column(column, 0.3 + number * (WIDE + STRIP + BETWEEN))
        self._arrows()
        self._legend(width)

    def _subtitle(self) -> str:
        if self.fitted is None:
            return "sites by role; a size with … is not the same in all blocks"
        if self.fitted.refused:
            return f"{self.fitted.method}: refused"
        return f"{self.fitted.method} trains {self.fitted.trainable:,} parameters, {self.fitted.share:.3%} of the model"

    def _draw_column(self, column: Column, x: float) -> None:
        left, y = x + STRIP, TOP
        blocks = f", {column.tower.blocks} blocks" if column.tower.blocks else ""
        title = f"{column.tower.title}{blocks}" if column.is_first else f"{column.tower.title}, continued"
        self.axes.text(left, y, title, fontsize=12, fontweight="bold", va="center")
        y += 0.27
        for box in column.before:
            self._draw_box(box, left, y, WIDE)
            y += box.height + 0.2
            self._flow(left, y)
        top = y
        for part in column.folds:
            self._draw_part(column, part, left, y)
            y += part.height + 0.22
            if part is not column.folds[-1] or column.behind:
                self._flow(left, y)
        if column.folds:
            self.places[column.tower.name] = (left, left + WIDE, top, y - 0.22)
            self._strip(column, x, top, y - 0.22)
        for box in column.behind:
            self._draw_box(box, left, y, WIDE)
            y += box.height + 0.2
            if box is not column.behind[-1]:
                self._flow(left, y)

    def _draw_part(self, column: Column, part: BlockGroup, left: float, y: float) -> None:
        self._frame(left, y, WIDE, part.height, "#F4F4F4", "#555555", 1.1)
        several = len(column.tower.folds) > 1
        title = f"{LETTERS[part.number % 26]}   {part.fold.title}" if several else part.fold.title
        title = _short(title, 58)
        self.axes.text(left + PAD, y + 0.18, title, fontsize=9.5, fontweight="bold", va="center")
        path = _short(part.fold.path, 82 - int(1.25 * len(title)))
        self._note(left + WIDE - PAD, y + 0.18, f"+{part.trained:,}" if part.trained else path, bool(part.trained))
        inner = y + 0.36
        for box in part.boxes:
            self._draw_box(box, left + PAD, inner, WIDE - 2 * PAD)
            if box.kind == "cross":
                self.crossings.append((column, box, left, inner + box.height / 2))
            inner += box.height + 0.1

    def _draw_box(self, box: Box, x: float, y: float, width: float) -> None:
        color = COLORS.get(box.kind, "#8C8C8C")
        edge = color if box.kind != "rest" else "#AAAAAA"
        self._frame(x, y, width, box.height, "white", edge, 2.4 if box.trained else 1.0)
        self.axes.text(x + PAD, y + 0.15, box.title, fontsize=8.5, va="center", color=color, fontweight="bold")
        if box.trained:
            self._note(x + width - PAD, y + 0.15, f"+{box.trained:,}", True)
        chip = (width - 2 * PAD - (PER_ROW - 1) * GAP) / PER_ROW
        for number, line in enumerate(box.lines):
            row, place = divmod(number, PER_ROW)
            self._chip(line, x + PAD + place * (chip + GAP), y + box.head + row * (HIGH + GAP), chip)

    def _chip(self, line: Line, x: float, y: float, width: float) -> None:
        trained = self.layout.count([line])
        color = COLORS.get(line.role.partition(".")[0], "#8C8C8C")
        strong = not self.layout.is_marked or bool(trained)
        edge, thick = ("black", 2.0) if trained else (color, 0.8)
        self._frame(x, y, width, HIGH, color, edge, thick, 1.0 if strong else 0.22, 0.05)
        ink = "white" if strong and line.role != "norm" else "#333333"
        style = {"ha": "center", "va": "center", "color": ink}
        name = line.role + (f" ×{line.count}" if line.count > 1 else "")
        self.axes.text(
            x + width / 2, y + HIGH * 0.3, name, fontsize=_size(name, width, 8.5), fontweight="bold", **style
        )
        under = f"+{trained:,}" if trained else "refused" if line.refuse else _sizes(line)
        self.axes.text(x + width / 2, y + HIGH * 0.72, under, fontsize=_size(under, width, 8.0), **style)

    def _frame(
        self, x: float, y: float, width: float, height: float, face: str, edge: str, line: float,
        alpha: float = 1.0, radius: float = 0.08,
    ) -> None:  # fmt: skip
        from matplotlib.colors import to_rgba
        from matplotlib.patches import FancyBboxPatch

        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, shape, facecolor=to_rgba(face, alpha), edgecolor=edge, linewidth=line)
        )

    def _note(self, x: float, y: float, text: str, strong: bool) -> None:
        weight, color = ("bold", "black") if strong else ("normal", "#666666")
        self.axes.text(x, y, text, fontsize=8.5, ha="right", va="center", fontweight=weight, color=color)

    def _flow(self, left: float, y: float) -> None:
        """An arrow down, in the gap above `y`."""
        arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", (left + WIDE / 2, y), (left + WIDE / 2, y - 0.2), arrowprops=arrow)

    def _strip(self, column: Column, x: float, top: float, bottom: float) -> None:
        """The order of the blocks: a cell each, with the letter of its kind."""
        high = min(0.24, (bottom - top) / max(1, len(column.order)))
        for place, number in enumerate(column.order):
            y = top + place * high
            trained = self.layout.is_marked and self.layout.count(column.tower.folds[number].lines)
            face, ink = ("#333333", "white") if trained else ("#DDDDDD", "#333333")
            self._frame(x - 0.02, y, 0.24, high - 0.03, face, "#888888", 0.6, 1.0, 0.02)
            style = {"ha": "center", "va": "center", "color": ink, "fontsize": min(7.5, high * 34)}
            self.axes.text(x + 0.1, y + (high - 0.03) / 2, LETTERS[number % 26], **style)

    def _arrows(self) -> None:
        """From the tower whose width keys have to each kind of cross-attention; from outside where that is none."""
        for column, box, left, y in self.crossings:
            key = next((line for line in box.lines if line.role in ("cross.k", "cross.v")), None)
            source = self._source(column, key) if key is not None else None
            arrow = {"arrowstyle": "-|>", "color": COLORS["cross"], "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
            if source is not None:
                other = self.places[source]
                start, end = (other[1], left + PAD) if other[1] <= left else (other[0], left + WIDE - PAD)
                self.axes.annotate(
                    "", (end, y), (start, other[3] - 0.1), arrowprops={**arrow, "connectionstyle": "arc3,rad=0.0"}
                )
            elif key is not None:
                self.axes.annotate("", (left + WIDE - PAD, y), (left + WIDE + 0.42, y), arrowprops=arrow)

    def _source(self, column: Column, key: Line) -> str | None:
        wide = {shape[1] for shape in key.shapes if len(shape) > 1}
        found = [
            other.tower.name
            for other in self.layout.columns
            if other.tower is not column.tower
            and any(line.role == "block" and wide & {s[0] for s in line.shapes if s} for line in other.tower.lines)
        ]
        return found[0] if found else None

    def _legend(self, width: float) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        kinds = [kind for kind in COLORS if kind in self.layout.kinds]
        handles: list[Untyped] = [Patch(facecolor=COLORS[kind], label=NAMES[kind]) for kind in kinds]
        if self.layout.is_marked:
            label = "trained, +parameters in all"
            handles.append(Patch(facecolor="white", edgecolor="black", linewidth=2, label=label))
        if self.crossings:
            label = "keys and values from elsewhere"
            handles.append(Line2D([], [], color=COLORS["cross"], linewidth=1.8, marker="<", markersize=5, label=label))
        place = {"loc": "lower left", "bbox_to_anchor": (0.1 / width, 0.0), "ncols": max(2, int(width / 1.8))}
        self.axes.legend(handles=handles, fontsize=8.5, frameon=False, **place)


def _sizes(line: Line) -> str:
    """What a site makes of what: `768→3072`, `3×3  64→128`."""
    shapes = [shape for shape in line.shapes if shape]
    if line.kind not in ("linear", "conv") or not all(len(shape) > 1 for shape in shapes):
        return shape_text(shapes)
    out, into = shape_text([shape[:1] for shape in shapes]), shape_text([shape[1:2] for shape in shapes])
    kernel = shape_text([shape[2:] for shape in shapes])
    if kernel and "…" in out:
        return f"{kernel}  →{out}"
    return f"{kernel}  {into}→{out}".strip()


def _short(text: str, limit: int) -> str:
    limit = max(limit, 8)
    return text if len(text) <= limit else f"…{text[len(text) - limit + 1 :]}"


def _size(text: str, width: float, most: float) -> float:
    """A font size at which a text fits into so many inches."""
    length = len(text) + sum(0.6 for sign in text if sign in "…→×")
    return max(4.5, min(most, width * 68 / (0.64 * max(1.0, length))))
