"""What a picture of a model holds: columns of towers, their blocks, and boxes of sub-layers with their sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mmpeft.bench.anatomy.fit import Fit
from mmpeft.bench.anatomy.overview import Fold, Line, Overview, Tower

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


@dataclass
class Column:
    """A tower, or a part of a tall one: what stands before its blocks, the blocks, and what follows."""

    tower: Tower
    before: list[Box]
    folds: list[BlockGroup]
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
        parts: list[list[BlockGroup]] = [[]]
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
class BlockGroup:
    """Blocks that are alike: the number of their kind, their boxes, and what a method trains of each as a whole."""

    number: int
    fold: Fold
    boxes: list[Box]
    trained: int

    @property
    def height(self) -> float:
        return 0.36 + sum(box.height + 0.1 for box in self.boxes) + PAD / 2


class Layout:
    """The columns of a picture; with a method, what it trains of each site."""

    def __init__(self, found: Overview, fitted: Fit | None) -> None:
        self.trained = fitted.by_site() if fitted is not None else {}
        self.is_marked = bool(self.trained)
        self.kinds: dict[str, None] = {}
        """First words of all roles that are drawn."""
        towers = [tower for tower in found.towers if tower.folds] or list(found.towers)
        whole = [self._column(tower) for tower in towers]
        for tower in found.towers:
            if tower not in towers:
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
            parts.append(BlockGroup(number, fold, self._boxes(fold.lines), whole))
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


def _order(folds: Sequence[Fold]) -> list[int]:
    """Of each block the number of its kind; none where they are of one kind, or where stacks count anew."""
    order = sorted((depth, number) for number, fold in enumerate(folds) for depth in fold.depths)
    unique = len({depth for depth, _ in order}) == len(order)
    return [number for _, number in order] if unique and len(folds) > 1 else []
