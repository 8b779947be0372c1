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
BOXED = ("attn", "cross", "mlp", "mixer", "expert", "router")
CHIP, HIGH, GAP, PAD = 1.22, 0.46, 0.08, 0.14
"""A site's width and height, what lies between two, and between a box and what it holds; in inches."""
PER_ROW = 5
WIDE = PER_ROW * CHIP + (PER_ROW - 1) * GAP + 4 * PAD
STRIP, BETWEEN, TOP = 0.42, 0.6, 1.18
"""The column that shows the order of blocks, the space between towers, and that above them."""
TALLEST = 13.0
"""A tower higher than this goes on in another column."""
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
        return self.head + rows * HIGH + max(0, rows - 1) * GAP + PAD

    @property
    def head(self) -> float:
        """What lies above its sites."""
        return 0.27 if self.title or self.trained else PAD


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
    width = 0.3 + len(drawing.columns) * (WIDE + STRIP + BETWEEN)
    height = max(column.height for column in drawing.columns) + TOP + 0.75
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
    """A tower, or a part of a tall one: what stands before its blocks, the blocks, and what follows."""

    tower: Tower
    before: list[Box]
    folds: list[Part]
    behind: list[Box]
    order: list[int] = field(default_factory=list)
    """Of each block in its order the number of its kind; empty where that is not known, or all are alike."""
    is_first: bool = True

    @property
    def height(self) -> float:
        outside = sum(box.height + 0.2 for box in (*self.before, *self.behind))
        return 0.3 + outside + sum(part.height + 0.22 for part in self.folds)

    def split(self) -> list[Column]:
        """Columns none of which is much higher than the tallest may be."""
        count = min(len(self.folds), -(-int(self.height * 10) // int(TALLEST * 10)))
        if count < 2:
            return [self]
        parts: list[list[Part]] = [[]]
        room = self.height / count
        used = sum(box.height + 0.2 for box in self.before)
        for part in self.folds:
            if parts[-1] and used + part.height / 2 > room and len(parts) < count:
                parts.append([])
                used = 0.0
            parts[-1].append(part)
            used += part.height + 0.22
        columns = [Column(self.tower, [], own, [], is_first=False) for own in parts]
        columns[0].before, columns[0].order, columns[0].is_first = self.before, self.order, True
        columns[-1].behind = self.behind
        return columns


@dataclass
class Part:
    """Blocks that are alike: the number of their kind, their boxes, and what a method trains of each as a whole."""

    number: int
    fold: Fold
    boxes: list[Box]
    trained: int

    @property
    def height(self) -> float:
        return 0.36 + sum(box.height + 0.1 for box in self.boxes) + PAD / 2


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
        loose = [tower for tower in found.towers if tower not in towers]
        whole = [self._column(tower) for tower in towers]
        for tower in loose:
            whole[0].before[:0] = self._boxes(tower.before)
            whole[-1].behind += self._boxes(tower.behind)
        self.columns = [column for tower in whole for column in tower.split()]

    def count(self, lines: Iterable[Line]) -> int:
        """Parameters that the method trains at sites."""
        return sum(self.trained.get(id(site), 0) for line in lines for site in line.sites)

    def _column(self, tower: Tower) -> Column:
        behind = sorted(tower.behind, key=lambda line: line.role == "head")
        parts = []
        for number, fold in enumerate(tower.folds):
            whole = self.count(line for line in fold.lines if line.role in ("block", "tokens"))
            parts.append(Part(number, fold, self._boxes(fold.lines), whole))
        return Column(tower, self._boxes(tower.before), parts, self._boxes(behind), _order(tower.folds))

    def _boxes(self, lines: Sequence[Line]) -> list[Box]:
        """Sub-layers in the order of their sites, each with the norm before it; in a last box what is left."""
        subs = {line.role: line for line in lines if line.role in ("attn", "cross", "mlp", "mixer")}
        streams = {sub.sites[0].stream: role for role, sub in subs.items()}
        own = [line for line in lines if line.role not in MODULES]
        kinds = [line.role.partition(".")[0] for line in own]
        self.kinds.update(dict.fromkeys(kinds))
        boxes: dict[str, Box] = {}
        for kind in [*(kind for kind in kinds if kind in BOXED), "rest"]:
            boxes.setdefault(kind, Box(kind, NAMES.get(kind, "")))
        for line, kind in zip(own, kinds):
            if line.role == "norm":
                kind = streams.get(line.sites[0].path, "rest")
            boxes[kind if kind in boxes else "rest"].lines.append(line)
        for kind, box in boxes.items():
            if kind != "rest":
                box.lines.sort(key=lambda line: line.role != "norm")
            box.trained = self.count(line for line in lines if line.role == kind or self._is_of(line, kind, subs))
        if len(boxes) > 1:
            boxes["rest"].title = "beside the sub-layers"
        return [box for box in boxes.values() if box.lines]

    def _is_of(self, line: Line, kind: str, subs: dict[str, Line]) -> bool:
        """Whether a line is the keys and values of an attention."""
        return line.role == "kv" and kind == next((role for role, sub in subs.items() if sub.path == line.path), "attn")

    def on(self, axes: Any, width: float, height: float) -> None:
        """Draw everything."""
        title = f"{self.found.name}: {self.found.cls}, {self.found.parameters:,} parameters"
        axes.text(0.3, 0.36, title, fontsize=_size(title, width - 0.6, 13.0), fontweight="bold", va="center")
        under = self._subtitle()
        axes.text(0.3, 0.68, under, fontsize=_size(under, width - 0.6, 10.0), va="center", color="#444444")
        for number, column in enumerate(self.columns):
            self._draw_column(axes, column, 0.3 + number * (WIDE + STRIP + BETWEEN))
        self._arrows(axes)
        self._legend(axes, width)

    def _subtitle(self) -> str:
        if self.fitted is None:
            return "sites by role; a size with … is not the same in all blocks"
        if self.fitted.refused:
            return f"{self.fitted.method}: refused"
        return f"{self.fitted.method} trains {self.fitted.trainable:,} parameters, {self.fitted.share:.3%} of the model"

    def _draw_column(self, axes: Any, column: Column, x: float) -> None:
        left, y = x + STRIP, TOP
        blocks = f", {column.tower.blocks} blocks" if column.tower.blocks else ""
        title = f"{column.tower.title}{blocks}" if column.is_first else f"{column.tower.title}, continued"
        axes.text(left, y, title, fontsize=12, fontweight="bold", va="center")
        y += 0.27
        for box in column.before:
            self._draw_box(axes, box, left, y, WIDE)
            y += box.height + 0.2
            self._flow(axes, left, y)
        top = y
        for part in column.folds:
            self._draw_part(axes, column, part, left, y)
            y += part.height + 0.22
            if part is not column.folds[-1] or column.behind:
                self._flow(axes, left, y)
        if column.folds:
            self.places[column.tower.name] = (left, left + WIDE, top, y - 0.22)
            self._strip(axes, column, x, top, y - 0.22)
        for box in column.behind:
            self._draw_box(axes, box, left, y, WIDE)
            y += box.height + 0.2
            if box is not column.behind[-1]:
                self._flow(axes, left, y)

    def _draw_part(self, axes: Any, column: Column, part: Part, left: float, y: float) -> None:
        self._frame(axes, left, y, WIDE, part.height, "#F4F4F4", "#555555", 1.1)
        several = len(column.tower.folds) > 1
        title = f"{LETTERS[part.number % 26]}   {part.fold.title}" if several else part.fold.title
        title = _short(title, 58)
        axes.text(left + PAD, y + 0.18, title, fontsize=9.5, fontweight="bold", va="center")
        path = _short(part.fold.path, 82 - int(1.25 * len(title)))
        self._note(
            axes, left + WIDE - PAD, y + 0.18, f"+{part.trained:,}" if part.trained else path, bool(part.trained)
        )
        inner = y + 0.36
        for box in part.boxes:
            self._draw_box(axes, box, left + PAD, inner, WIDE - 2 * PAD)
            if box.kind == "cross":
                self.crossings.append((column, box, left, inner + box.height / 2))
            inner += box.height + 0.1

    def _draw_box(self, axes: Any, box: Box, x: float, y: float, width: float) -> None:
        color = COLORS.get(box.kind, "#8C8C8C")
        edge = color if box.kind != "rest" else "#AAAAAA"
        self._frame(axes, x, y, width, box.height, "white", edge, 2.4 if box.trained else 1.0)
        axes.text(x + PAD, y + 0.15, box.title, fontsize=8.5, va="center", color=color, fontweight="bold")
        if box.trained:
            self._note(axes, x + width - PAD, y + 0.15, f"+{box.trained:,}", True)
        chip = (width - 2 * PAD - (PER_ROW - 1) * GAP) / PER_ROW
        for number, line in enumerate(box.lines):
            row, place = divmod(number, PER_ROW)
            self._chip(axes, line, x + PAD + place * (chip + GAP), y + box.head + row * (HIGH + GAP), chip)

    def _chip(self, axes: Any, line: Line, x: float, y: float, width: float) -> None:
        trained = self.count([line])
        color = COLORS.get(line.role.partition(".")[0], "#8C8C8C")
        strong = not self.is_marked or bool(trained)
        edge, thick = ("black", 2.0) if trained else (color, 0.8)
        self._frame(axes, x, y, width, HIGH, color, edge, thick, 1.0 if strong else 0.22, 0.05)
        ink = "white" if strong and line.role != "norm" else "#333333"
        style = {"ha": "center", "va": "center", "color": ink}
        name = line.role + (f" ×{line.count}" if line.count > 1 else "")
        axes.text(x + width / 2, y + HIGH * 0.3, name, fontsize=_size(name, width, 8.5), fontweight="bold", **style)
        under = f"+{trained:,}" if trained else "refused" if line.refuse else _sizes(line)
        axes.text(x + width / 2, y + HIGH * 0.72, under, fontsize=_size(under, width, 8.0), **style)

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
        high = min(0.24, (bottom - top) / max(1, len(column.order)))
        for place, number in enumerate(column.order):
            y = top + place * high
            trained = self.is_marked and self.count(column.tower.folds[number].lines)
            face, ink = ("#333333", "white") if trained else ("#DDDDDD", "#333333")
            self._frame(axes, x - 0.02, y, 0.24, high - 0.03, face, "#888888", 0.6, 1.0, 0.02)
            style = {"ha": "center", "va": "center", "color": ink, "fontsize": min(7.5, high * 34)}
            axes.text(x + 0.1, y + (high - 0.03) / 2, LETTERS[number % 26], **style)

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
            if other.tower is not column.tower
            and any(line.role == "block" and wide & {s[0] for s in line.shapes if s} for line in other.tower.lines)
        ]
        return found[0] if found else None

    def _legend(self, axes: Any, width: float) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        kinds = [kind for kind in COLORS if kind in self.kinds]
        handles: list[Any] = [Patch(facecolor=COLORS[kind], label=NAMES[kind]) for kind in kinds]
        if self.is_marked:
            label = "trained, +parameters in all"
            handles.append(Patch(facecolor="white", edgecolor="black", linewidth=2, label=label))
        if self.crossings:
            label = "keys and values from elsewhere"
            handles.append(Line2D([], [], color=COLORS["cross"], linewidth=1.8, marker="<", markersize=5, label=label))
        place = {"loc": "lower left", "bbox_to_anchor": (0.1 / width, 0.0), "ncols": max(2, int(width / 1.8))}
        axes.legend(handles=handles, fontsize=8.5, frameon=False, **place)


def _order(folds: Sequence[Fold]) -> list[int]:
    """Of each block the number of its kind; none where they are of one kind, or where stacks count anew."""
    order = sorted((depth, number) for number, fold in enumerate(folds) for depth in fold.depths)
    unique = len({depth for depth, _ in order}) == len(order)
    return [number for _, number in order] if unique and len(folds) > 1 else []


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
