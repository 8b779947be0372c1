"""Towers: blocks along one stream, named by what they read."""

from __future__ import annotations

from collections.abc import Iterable

from mmpeft.sites.blocks import Block, pattern
from mmpeft.sites.graph import Graph
from mmpeft.sites.streams import Sublayer


def name_towers(graph: Graph, subs: Iterable[Sublayer], found: list[Block]) -> None:
    """Give each block its tower and its depth in it.

    Blocks of one list, and lists that hand a stream from one to the next and stand under one module, are a tower. It
    is `image`, `video`, `audio` or `text` by what it reads; one without sequence of pixels or words has no name.
    """
    groups: dict[str, list[Block]] = {}
    for block in found:
        groups.setdefault(_home(block.path), []).append(block)
    names = {home: _reads(graph, own) for home, own in groups.items()}
    used: dict[str, int] = {}
    several = len(set(names.values())) > 1 or len(groups) > 1
    for home, own in groups.items():
        name = names[home]
        if several and list(names.values()).count(name) > 1:
            name = home.rpartition(".")[0].rpartition(".")[2] or home or name
        for block in own:
            block.tower = name
            block.depth = used.get(name, 0)
            used[name] = block.depth + 1


def _home(path: str) -> str:
    """The module above the lists that a block stands in."""
    names = pattern(path).split(".")
    first = next((i for i, name in enumerate(names) if name.endswith("#")), len(names))
    return ".".join(names[: max(0, first - 1)])


def _reads(graph: Graph, own: list[Block]) -> str:
    """What the first block's stream comes from: the arguments of the model behind it."""
    first = next((block for block in own if block.first >= 0), None)
    if first is None or not graph.calls[first.first].reads:
        return ""
    start = graph.calls[first.first].reads[0]
    inputs = [op for op in graph.ops if op.name == "input" and graph.is_above(op.index, start)]
    for dims, name in ((5, "video"), (4, "image")):
        if any(len(op.shape) == dims for op in inputs):
            return name
    if any("ids" in op.label for op in inputs):
        return "text"
    if any(len(op.shape) == 3 or "audio" in op.label or "value" in op.label or "feature" in op.label for op in inputs):
        return "audio"
    return "text" if inputs else ""
