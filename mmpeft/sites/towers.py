"""Towers: blocks along one stream, named by what they read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_

from mmpeft.sites.blocks import Block, pattern
from mmpeft.sites.graph import Graph
from mmpeft.sites.record import Op
from mmpeft.sites.streams import Sublayer

NAMES = {
    "video": ("video",),
    "image": ("pixel", "image", "visual", "grid_thw"),
    "audio": ("audio", "speech", "wave", "input_features", "input_values"),
}
"""What the name of an argument says of it."""
NOT_WORDS = ("grid", "pixel", "image", "video", "audio", "mask", "aspect", "position")


def name_towers(graph: Graph, subs: Iterable[Sublayer], found: list[Block]) -> None:
    """Give each block its tower and its depth in it.

    Blocks under one module whose stream comes from the same arguments of the model are a tower: `text`, `image`,
    `video`, `audio` or `sequence` by what those are. Two of one kind are told apart by where they stand; a stream that
    comes from none is `queries`. What did not run is called as its module is.
    """
    sums = {graph.root(sub.sum): sub.stream for sub in subs} | {sub.sum: sub.stream for sub in subs}
    origins: dict[str, frozenset[int]] = {}
    groups: dict[tuple[frozenset[int], str], list[Block]] = {}
    for block in found:
        form = pattern(block.path)
        if form not in origins or (block.first >= 0 and not origins[form]):
            origins[form] = _origins(graph, sums, block)
    for block in found:
        form = pattern(block.path)
        key = next((k for k in groups if _is_same(graph, k, origins[form], _home(block.path))), None)
        groups.setdefault(key or (origins[form], _home(block.path)), []).append(block)
    kinds = {key: _kind(graph, key[0]) for key in groups}
    kinds |= {key: _called(key[1], own[0]) for key, own in groups.items() if all(block.first < 0 for block in own)}
    taken: set[str] = set()
    for key, own in groups.items():
        name = kinds[key]
        alike = [other for other in groups if kinds[other] == name and other != key]
        if alike:
            name = _distinct(own[0].path, groups[alike[0]][0].path) or name
        name = _unused(name, own[0].path, taken)
        taken.add(name)
        for depth, block in enumerate(own):
            block.tower, block.depth = name, depth
    below = _below(graph, groups.values())
    for block in found:
        block.below = block.tower in below


def _called(home: str, block: Block) -> str:
    """The name of the module that blocks stand in."""
    first = block.path.partition(".")[0]
    return next((name for name in home.split(".")[::-1] if name not in ("", "model")), first)


def _below(graph: Graph, towers: Iterable[list[Block]]) -> set[str]:
    """Towers that give what another one reads, which gives them nothing at its end, or that no output comes from."""
    reads: dict[str, int] = {}
    gives: dict[str, int] = {}
    ends: dict[str, int] = {}
    for own in towers:
        calls = [graph.calls[block.first] for block in own if block.first >= 0]
        name = own[0].tower
        reads[name] = _bits(graph.above(i) for call in calls for i in call.reads)
        reads[name] |= _bits(graph.above(call.last - 1) for call in calls)  # what a module has kept for its blocks
        gives[name] = _bits(1 << i for call in calls for i in call.gives)
        ends[name] = _bits(1 << i for call in calls[-1:] for i in call.gives)

    def goes_into(one: str, other: str) -> bool:
        return bool(gives[one] & reads[other]) and not ends[other] & reads[one]

    below = {name for name in gives if not gives[name] & graph.returned}
    below |= {
        one for one in gives for other in gives if one != other and goes_into(one, other) and not goes_into(other, one)
    }
    return below if below != set(gives) else set()


def _bits(found: Iterable[int]) -> int:
    return reduce(or_, found, 0)


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
    """What the arguments are, by their names, or by their shapes: sizes of the batch first."""
    inputs = [graph.ops[i] for i in origin]
    if any(_is_text(op) for op in inputs):
        return "text"
    data = [op for op in inputs if op.is_floating]
    for known in (data, graph.inputs if any(len(op.shape) in (2, 3) for op in data) else []):
        for name, words in NAMES.items():
            if any(word in op.label.lower() for op in known for word in words):
                return name
    for dims, name in ((5, "video"), (4, "image"), (3, "sequence"), (2, "audio")):
        if any(len(op.shape) == dims for op in data):
            return name
    return "text" if inputs else "queries"


def _is_text(op: Op) -> bool:
    plain = not op.is_floating and len(op.shape) == 2
    return plain and not any(word in op.label.lower() for word in NOT_WORDS)


def _distinct(path: str, other: str) -> str:
    """The first name in which a path differs from another."""
    return next((a for a, b in zip(path.split("."), other.split(".")) if a != b and not a.isdigit()), "")


def _unused(name: str, path: str, taken: set[str]) -> str:
    """The name, with as much of the path behind it as tells it from others."""
    for part in (p for p in path.split(".") if not p.isdigit() and p != name):
        if name not in taken:
            break
        name = part if part not in taken and len(part) > 3 and part != "model" else f"{name}_{part}"
    return name
