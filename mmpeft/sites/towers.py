"""Towers: blocks along one stream, named by what they read."""

from __future__ import annotations

from collections.abc import Iterable

from mmpeft.sites.blocks import Block, pattern
from mmpeft.sites.graph import Graph
from mmpeft.sites.streams import Sublayer


def name_towers(graph: Graph, subs: Iterable[Sublayer], found: list[Block]) -> None:
    """Give each block its tower and its depth in it.

    Blocks under one module whose stream comes from the same arguments of the model are a tower: `text`, `image`,
    `video`, `audio` or `sequence` by what those are. Two of one kind are told apart by where they stand; a stream that
    comes from none is `queries`.
    """
    sums = {graph.root(sub.sum): sub.stream for sub in subs} | {sub.sum: sub.stream for sub in subs}
    origins: dict[str, frozenset[int]] = {}
    groups: dict[tuple[frozenset[int], str], list[Block]] = {}
    for block in found:
        form = pattern(block.path)
        if form not in origins or (block.first >= 0 and not origins[form]):
            origins[form] = _origins(graph, sums, block)
        key = next((k for k in groups if _is_same(graph, k, origins[form], _home(block.path))), None)
        groups.setdefault(key or (origins[form], _home(block.path)), []).append(block)
    kinds = {key: _kind(graph, key[0]) for key in groups}
    for key, own in groups.items():
        name = kinds[key]
        alike = [other for other in groups if kinds[other] == name and other != key]
        if alike:
            name = _distinct(own[0].path, groups[alike[0]][0].path) or name
        for depth, block in enumerate(own):
            block.tower, block.depth = name, depth


def _home(path: str) -> str:
    """The module above the lists that a block stands in."""
    names = pattern(path).split(".")
    first = next((i for i, name in enumerate(names) if name.endswith("#")), len(names))
    own = first - 1 if names[first : first + 1] == ["#"] else first
    return ".".join(names[: max(0, min(own, len(names) - 1))])


def _is_same(graph: Graph, key: tuple[frozenset[int], str], origin: frozenset[int], home: str) -> bool:
    """Whether blocks continue a stream: they stand under one module, and theirs comes from there too."""
    one, other = key[1], home
    if _kind(graph, key[0]) != _kind(graph, origin) or not (key[0] & origin or key[0] == origin):
        return False
    return not one or not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


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
    for dims, name in ((5, "video"), (4, "image"), (3, "sequence"), (2, "audio")):
        if any(len(op.shape) == dims and op.is_floating for op in inputs):
            return name
    return "text" if inputs else "queries"


def _distinct(path: str, other: str) -> str:
    """The first name in which a path differs from another."""
    return next((a for a, b in zip(path.split("."), other.split(".")) if a != b and not a.isdigit()), "")
