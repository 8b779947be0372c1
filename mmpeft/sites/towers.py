"""Towers: blocks along one stream, named by what they read."""

from __future__ import annotations

from collections.abc import Iterable

from mmpeft.sites.blocks import Block, pattern
from mmpeft.sites.graph import Graph
from mmpeft.sites.streams import Sublayer


def name_towers(graph: Graph, subs: Iterable[Sublayer], found: list[Block]) -> None:
    """Give each block its tower and its depth in it.

    Blocks whose stream comes from the same arguments of the model are a tower: `text`, `image`, `video` or `audio` by
    what those are. Two of one kind are told apart by where they stand; a stream that comes from none is `queries`.
    """
    sums = {graph.root(sub.sum): sub.stream for sub in subs} | {sub.sum: sub.stream for sub in subs}
    origins: dict[str, frozenset[int]] = {}
    groups: dict[frozenset[int], list[Block]] = {}
    for block in found:
        form = pattern(block.path)
        if form not in origins or (block.first >= 0 and not origins[form]):
            origins[form] = _origins(graph, sums, block)
        groups.setdefault(origins[form], []).append(block)
    kinds = {origin: _kind(graph, origin) for origin in groups}
    for origin, own in groups.items():
        name = kinds[origin]
        alike = [other for other in groups if kinds[other] == name and other != origin]
        if alike:
            name = _distinct(own[0].path, groups[alike[0]][0].path) or name
        for depth, block in enumerate(own):
            block.tower, block.depth = name, depth


def _origins(graph: Graph, sums: dict[int, int], block: Block) -> frozenset[int]:
    """Arguments that a block's stream comes from, by way of streams alone."""
    if block.first < 0 or not graph.calls[block.first].reads:
        return frozenset()
    todo, seen, found = [graph.calls[block.first].reads[0]], set(), set()
    while todo:
        i = todo.pop()
        if i in seen:
            continue
        seen.add(i)
        op = graph.ops[i]
        if op.name == "input":
            found.add(i)
        else:
            todo += [sums[i]] if i in sums else graph.activations(op)
            if op.name == "embedding":
                todo += op.inputs[1:]
    return frozenset(found)


def _kind(graph: Graph, origin: frozenset[int]) -> str:
    """What the arguments are; sizes of the batch first."""
    inputs = [graph.ops[i] for i in origin]
    if any(not op.is_floating and len(op.shape) == 2 for op in inputs):
        return "text"
    for dims, name in ((5, "video"), (4, "image"), (3, "audio"), (2, "audio")):
        if any(len(op.shape) == dims and op.is_floating for op in inputs):
            return name
    return "text" if inputs else "queries"


def _distinct(path: str, other: str) -> str:
    """The first name in which a path differs from another."""
    return next((a for a, b in zip(path.split("."), other.split(".")) if a != b and not a.isdigit()), "")
