"""A model as a picture: towers side by side, blocks that are alike drawn once, and a method's sites marked."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpeft.bench.anatomy.fit import Fit
from mmpeft.bench.anatomy.overview import Fold, Line, Overview, Tower
from mmpeft.bench.anatomy.table import shape_text
from mmpeft.errors import ConfigError

COLORS = {
    "attn": "#4C78A8",
    "cross": "#B279A2",
    "mlp": "#F58518",
    "mixer": "#54A24B",
    "expert": "#E45756",
    "router": "#9D755D",
    "conv": "#72B7B2",
    "proj": "#8C8C8C",
    "embed": "#D4A72C",
    "time": "#E5A4B5",
    "norm": "#BAB0AC",
    "head": "#2F4B7C",
}
"""Of a role's first word; what is none of them is grey."""
NAMES = {
    "attn": "self-attention",
    "cross": "cross-attention",
    "mlp": "feed-forward",
    "mixer": "mixer",
    "expert": "experts",
    "router": "router",
    "conv": "convolution",
    "proj": "other projection",
    "embed": "embedding",
    "time": "time step",
    "norm": "norm",
    "head": "head",
}
MODULES = ("attn", "cross", "mlp", "mixer", "block", "tokens", "kv", "stack")
"""Roles of sites that are no projections: they are the boxes, not what is in them."""
BEFORE = ("embed", "time")
CHIP, HIGH, GAP, PAD = 1.34, 0.46, 0.08, 0.14
"""A site's width and height, what lies between two, and between a box and what it holds; in inches."""
PER_ROW = 4
WIDE = PER_ROW * CHIP + (PER_ROW - 1) * GAP + 4 * PAD
STRIP = 0.42
"""The column that shows the order of blocks."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class Box:
    """A sub-layer, or what stands beside sub-layers: its sites, and what a method trains of it as a whole."""

    kind: str
    title: str
    lines: list[Line] = field(default_factory=list)
    trained: int = 0

    @property
    def height(self) -> float:
        rows = -(-len(self.lines) // PER_ROW)
        return 0.27 + rows * HIGH + max(0, rows - 1) * GAP + PAD


def draw(found: Overview, fitted: Fit | None = None) -> bytes:
    """A PNG of a model's anatomy; with a method, its sites with how many parameters each trains in all.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("drawing a model needs matplotlib (pip install matplotlib)") from error
    drawing = _Drawing(found, fitted)
    width = max(2, len(drawing.columns)) * (WIDE + STRIP + 0.7) + 0.4
    if len(drawing.columns) == 1:
        width = WIDE + STRIP + 1.1
    height = max(column.height for column in drawing.columns) + 2.0
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    drawing.on(axes, width, height)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, facecolor="white")
    return out.getvalue()


@dataclass
class Column:
    """A tower: what stands before its blocks, the blocks, and what follows."""

    tower: Tower
    before: list[Box]
    folds: list[tuple[Fold, list[Box], int]]
    """With what a method trains of each block as a whole."""
    behind: list[Box]

    @property
    def height(self) -> float:
        return (
            0.5
            + sum(_stack(self.before))
            + sum(_fold_height(b) + 0.22 for _, b, _ in self.folds)
            + sum(_stack(self.behind))
        )


def _stack(boxes: Iterable[Box]) -> list[float]:
    return [box.height + 0.2 for box in boxes]


def _fold_height(boxes: Sequence[Box]) -> float:
    return 0.36 + sum(box.height + 0.1 for box in boxes) + PAD / 2


class _Drawing:
    def __init__(self, found: Overview, fitted: Fit | None) -> None:
        self.found, self.fitted = found, fitted
        self.trained = fitted.by_site() if fitted is not None else {}
        self.is_marked = bool(self.trained)
        self.kinds: dict[str, None] = {}
        self.places: dict[str, tuple[float, float, float, float]] = {}
        """Left, right, top and bottom of each tower's blocks."""
        self.crossings: list[tuple[Column, Box, float, float]] = []
        towers = [tower for tower in found.towers if tower.folds] or list(found.towers)
        loose = [line for tower in found.towers if tower not in towers for line in tower.around]
        self.columns = [self._column(tower) for tower in towers]
        if loose:
            self.columns[-1].behind += self._boxes([line for line in loose if line.role not in BEFORE])
            self.columns[0].before[:0] = self._boxes([line for line in loose if line.role in BEFORE])

    def count(self, lines: Iterable[Line]) -> int:
        """Parameters that the method trains at sites."""
        return sum(self.trained.get(id(site), 0) for line in lines for site in line.sites)

    def _column(self, tower: Tower) -> Column:
        before = [line for line in tower.around if line.role in BEFORE]
        behind = [line for line in tower.around if line.role not in BEFORE]
        folds = []
        for fold in tower.folds:
            whole = self.count(line for line in fold.lines if line.role in ("block", "tokens"))
            folds.append((fold, self._boxes(fold.lines), whole))
        return Column(tower, self._boxes(before), folds, self._boxes(behind))

    def _boxes(self, lines: Sequence[Line]) -> list[Box]:
        """Sub-layers in the order of their sites, norms with the sub-layer that follows them."""
        boxes: dict[str, Box] = {}
        norms: list[Line] = []
        subs = {line.role: line for line in lines if line.role in ("attn", "cross", "mlp", "mixer")}
        for line in lines:
            kind = line.role.partition(".")[0]
            if line.role == "norm":
                norms.append(line)
            elif line.role not in MODULES:
                kind = kind if kind in ("attn", "cross", "mlp", "mixer", "expert", "router") else "rest"
                box = boxes.setdefault(kind, Box(kind, NAMES.get(kind, "")))
                box.lines.append(line)
        for line in norms:
            owner = next((role for role, sub in subs.items() if sub.sites[0].stream == line.sites[0].path), "rest")
            box = boxes.get(owner)
            if box is None:
                box = boxes.setdefault("rest", Box("rest", ""))
            box.lines.insert(0 if owner != "rest" else len(box.lines), line)
        for kind, box in boxes.items():
            box.trained = self.count(
                line for line in lines if line.role == kind or (line.role == "kv" and kind == self._kv(line, subs))
            )
            self.kinds.update(dict.fromkeys(line.role.partition(".")[0] for line in box.lines))
        return list(boxes.values())

    def _kv(self, line: Line, subs: dict[str, Line]) -> str:
        """The attention whose keys and values these are."""
        return next((role for role, sub in subs.items() if sub.path == line.path), "attn")

    def on(self, axes: Any, width: float, height: float) -> None:
        """Draw everything."""
        title = f"{self.found.name}: {self.found.cls}, {self.found.parameters:,} parameters"
        axes.text(0.3, 0.36, title, fontsize=13, fontweight="bold", va="center")
        axes.text(0.3, 0.66, self._subtitle(), fontsize=10, va="center", color="#444444")
        x = 0.3
        for column in self.columns:
            self._draw_column(axes, column, x)
            x += WIDE + STRIP + 0.7
        self._arrows(axes)
        self._legend(axes, width, height)

    def _subtitle(self) -> str:
        if self.fitted is None:
            return "sites by role; a size with … is not the same in all blocks"
        if self.fitted.refused:
            return f"{self.fitted.method}: refused"
        return f"{self.fitted.method} trains {self.fitted.trainable:,} parameters, {self.fitted.share:.3%} of the model"

    def _draw_column(self, axes: Any, column: Column, x: float) -> None:
        y = 1.18
        blocks = f", {column.tower.blocks} blocks" if column.tower.blocks else ""
        axes.text(x + STRIP, y, f"{column.tower.title}{blocks}", fontsize=12, fontweight="bold", va="center")
        y += 0.27
        left = x + STRIP
        for box in column.before:
            self._draw_box(axes, box, left, y, WIDE)
            y += box.height + 0.2
            self._flow(axes, left, y)
        top = y
        for number, (fold, boxes, whole) in enumerate(column.folds):
            high = _fold_height(boxes)
            self._frame(axes, left, y, WIDE, high, "#F4F4F4", "#555555", 1.1)
            title = f"{LETTERS[number % 26]}   {fold.title}" if len(column.folds) > 1 else fold.title
            axes.text(left + PAD, y + 0.18, title, fontsize=9.5, fontweight="bold", va="center")
            right = f"+{whole:,}" if whole else _short(fold.path, 38 - max(0, len(title) - 22))
            self._note(axes, left + WIDE - PAD, y + 0.18, right, bool(whole))
            inner = y + 0.36
            for box in boxes:
                self._draw_box(axes, box, left + PAD, inner, WIDE - 2 * PAD)
                if box.kind == "cross":
                    self.crossings.append((column, box, left, inner + box.height / 2))
                inner += box.height + 0.1
            y += high + 0.22
            if number + 1 < len(column.folds) or column.behind:
                self._flow(axes, left, y)
        if column.folds:
            self.places[column.tower.name] = (left, left + WIDE, top, y - 0.22)
            self._strip(axes, column, x, top, y - 0.22)
        for number, box in enumerate(column.behind):
            self._draw_box(axes, box, left, y, WIDE)
            y += box.height + 0.2
            if number + 1 < len(column.behind):
                self._flow(axes, left, y)

    def _draw_box(self, axes: Any, box: Box, x: float, y: float, width: float) -> None:
        color = COLORS.get(box.kind, "#8C8C8C")
        self._frame(
            axes,
            x,
            y,
            width,
            box.height,
            "white",
            color if box.kind != "rest" else "#AAAAAA",
            2.2 if box.trained else 1.0,
        )
        title = box.title or ("beside them" if box.kind == "rest" and width < WIDE else "")
        axes.text(x + PAD, y + 0.15, title, fontsize=8.5, va="center", color=color, fontweight="bold")
        if box.trained:
            self._note(axes, x + width - PAD, y + 0.15, f"+{box.trained:,}", True)
        for number, line in enumerate(box.lines):
            row, place = divmod(number, PER_ROW)
            chip = (width - 2 * PAD - (PER_ROW - 1) * GAP) / PER_ROW
            self._chip(axes, line, x + PAD + place * (chip + GAP), y + 0.27 + row * (HIGH + GAP), chip)

    def _chip(self, axes: Any, line: Line, x: float, y: float, width: float) -> None:
        trained = self.count([line])
        color = COLORS.get(line.role.partition(".")[0], "#8C8C8C")
        dark = not self.is_marked or bool(trained)
        self._frame(
            axes,
            x,
            y,
            width,
            HIGH,
            color,
            "black" if trained else color,
            2.0 if trained else 0.8,
            1.0 if dark else 0.22,
            0.05,
        )
        ink = "white" if dark and line.role != "norm" else "#333333"
        style = {"ha": "center", "va": "center", "color": ink, "clip_on": True}
        name = line.role + (f" ×{line.count}" if line.count > 1 else "")
        axes.text(x + width / 2, y + HIGH * 0.3, name, fontsize=8.5, fontweight="bold", **style)
        under = f"+{trained:,}" if trained else "refused" if line.refuse else shape_text(line.shapes)
        axes.text(x + width / 2, y + HIGH * 0.72, under, fontsize=_size(under, width), **style)

    def _frame(
        self, axes: Any, x: float, y: float, width: float, height: float, face: str, edge: str, line: float,
        alpha: float = 1.0, radius: float = 0.08,
    ) -> None:  # fmt: skip
        from matplotlib.colors import to_rgba
        from matplotlib.patches import FancyBboxPatch

        shape = f"round,pad=0,rounding_size={radius}"
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, shape, facecolor=to_rgba(face, alpha), edgecolor=edge, linewidth=line)
        )

    def _note(self, axes: Any, x: float, y: float, text: str, strong: bool) -> None:
        weight, color = ("bold", "black") if strong else ("normal", "#666666")
        axes.text(x, y, text, fontsize=8.5, ha="right", va="center", fontweight=weight, color=color)

    def _flow(self, axes: Any, left: float, y: float) -> None:
        """An arrow down, in the gap above `y`."""
        arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (left + WIDE / 2, y), (left + WIDE / 2, y - 0.2), arrowprops=arrow)

    def _strip(self, axes: Any, column: Column, x: float, top: float, bottom: float) -> None:
        """The order of the blocks: a cell each, with the letter of its kind."""
        if len(column.folds) < 2:
            return
        order = sorted(
            (site_order, n) for n, (fold, _, _) in enumerate(column.folds) for site_order in _orders(fold, n, column)
        )
        high = min(0.24, (bottom - top) / len(order))
        for place, (_, number) in enumerate(order):
            y = top + place * high
            trained = self.is_marked and self.count(column.folds[number][0].lines)
            face = "#333333" if trained else "#DDDDDD"
            self._frame(axes, x - 0.02, y, 0.24, high - 0.03, face, "#888888", 0.6, 1.0, 0.02)
            if high > 0.11:
                ink = "white" if trained else "#333333"
                text = {"ha": "center", "va": "center", "color": ink}
                axes.text(x + 0.1, y + (high - 0.03) / 2, LETTERS[number % 26], fontsize=min(7.5, high * 34), **text)

    def _arrows(self, axes: Any) -> None:
        """From the tower whose width keys have to each kind of cross-attention; from outside where that is none."""
        for column, box, left, y in self.crossings:
            key = next((line for line in box.lines if line.role in ("cross.k", "cross.v")), None)
            source = self._source(column, key) if key is not None else None
            arrow = {"arrowstyle": "-|>", "color": COLORS["cross"], "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
            if source is not None:
                other = self.places[source]
                start, end = (other[1], left + PAD) if other[1] <= left else (other[0], left + WIDE - PAD)
                axes.annotate(
                    "", (end, y), (start, other[3] - 0.1), arrowprops={**arrow, "connectionstyle": "arc3,rad=0.0"}
                )
            elif key is not None:
                axes.annotate("", (left + WIDE - PAD, y), (left + WIDE + 0.42, y), arrowprops=arrow)

    def _source(self, column: Column, key: Line) -> str | None:
        wide = {shape[1] for shape in key.shapes if len(shape) > 1}
        found = [
            other.tower.name
            for other in self.columns
            if other is not column
            and any(
                line.role == "block" and wide & {s[0] for s in line.shapes if s}
                for f, _, _ in other.folds
                for line in f.lines
            )
        ]
        return found[0] if found else None

    def _legend(self, axes: Any, width: float, height: float) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        kinds = [kind for kind in COLORS if kind in self.kinds]
        handles: list[Any] = [Patch(facecolor=COLORS[kind], label=NAMES[kind]) for kind in kinds]
        if self.is_marked:
            handles.append(
                Patch(facecolor="white", edgecolor="black", linewidth=2, label="trained, +parameters in all")
            )
        if self.crossings:
            label = "keys and values from elsewhere"
            handles.append(Line2D([], [], color=COLORS["cross"], linewidth=1.8, marker="<", markersize=5, label=label))
        columns = max(2, int(width / 1.75))
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.02, 0.0), ncols=columns, fontsize=8.5, frameon=False
        )


def _orders(fold: Fold, number: int, column: Column) -> list[tuple[int, int]]:
    """Where the blocks of a fold come in the tower; stacks that count anew come one after the other."""
    return [(0, depth) for depth in fold.depths]


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"…{text[len(text) - limit + 1 :]}"


def _size(text: str, width: float) -> float:
    """A font size at which a text fits."""
    return max(5.0, min(8.0, width * 100 / max(1, len(text))))
