"""Blocks in a recorded pass: the modules that hold whole sums of a residual stream and have siblings of their kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from mmpeft.sites.graph import Graph
from mmpeft.sites.streams import Sublayer


@dataclass
class Block:
    """One block: its place in the order in which blocks ran, and the group it stands in."""

    path: str
    depth: int = -1
    tower: str = ""
    first: int = -1
    """The first call of it; -1 where it did not run."""
    below: bool = False
    """Whether what its tower gives goes into another tower, or nowhere."""


def pattern(path: str) -> str:
    """A path without its numbers: what the members of a list have in common."""
    return re.sub(r"\d+", "#", path)


def parent(path: str) -> str:
    return path.rpartition(".")[0]


class Lists:
    """Which modules stand in a list of their kind."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.members: dict[str, list[str]] = {}
        for path in modules:
            if path and re.search(r"\d+$", path):
                self.members.setdefault(pattern(path), []).append(path)

    def siblings(self, path: str) -> list[str]:
        """The members of the same list, itself included; none for what stands in no list."""
        name = path.rpartition(".")[2]
        if not re.search(r"\d+$", name):
            return []
        own = [p for p in self.members[pattern(path)] if parent(p) == parent(path)]
        alike = [p for p in own if type(self.modules[p]) is type(self.modules[path])]
        return own if name.isdigit() else alike if len(alike) > 1 else []

    def is_alike(self, path: str) -> bool:
        """Whether all members of a list are of one class."""
        return len({type(self.modules[p]) for p in self.siblings(path)}) == 1

    def around(self, path: str) -> list[str]:
        """The module and those around it that stand in a list, innermost first."""
        found = []
        while path:
            if self.siblings(path):
                found.append(path)
            path = parent(path)
        return found


def blocks(graph: Graph, modules: dict[str, nn.Module], subs: Iterable[Sublayer]) -> list[Block]:
    """Every block, in the order in which they ran; those that rested take the place of their list."""
    lists = Lists(modules)
    held: dict[str, str] = {}
    for sub in subs:
        inside = [op.index for op in sub.products] or [op.index for op in sub.ops]
        holder = next(graph.holding([*inside, sub.sum]), None)
        around = lists.around(holder.path) if holder is not None else []
        if holder is not None and around:
            held[holder.path] = _choose(around, lists)
    chosen = set(_alike(held, modules))
    chosen -= {path for path in chosen if _is_stage(path, chosen, lists)}
    paths = {path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)}
    paths = paths or repeated(graph, modules)
    classes = {type(modules[path]) for path in paths}
    forms = {pattern(path) for path in paths}
    for path, module in modules.items():
        listed = pattern(path) in forms or lists.siblings(path)
        if type(module) in classes and listed and not any(_is_within(path, other) for other in paths - {path}):
            paths.add(path)
    return _ordered(graph, paths, list(modules))


def repeated(graph: Graph, modules: dict[str, nn.Module]) -> set[str]:
    """Of a model without residual sums: the outermost modules of which there are several of a class, with products.

    Those that hold several, or the members of a list where none does.
    """
    products = Counter(call.path for op in graph.products for call in graph.around(op.index))
    for least in (2, 1):
        held = [path for path, count in products.items() if path and count >= least]
        held = held if least > 1 else [path for path in held if pattern(path).endswith("#")]
        kinds = Counter(type(modules[path]) for path in held)
        own = [p for p in held if kinds[type(modules[p])] > 1 and not _is_of_torch(modules[p])]
        if own:
            break
    forms = {pattern(path) for path in own}
    own += [path for path in held if pattern(path) in forms and path not in own]
    return {path for path in own if not any(path.startswith(f"{other}.") for other in own)}


def _alike(held: dict[str, str], modules: dict[str, nn.Module]) -> Iterator[str]:
    """What was chosen around each holder of sums, or its only holder where that is of the class of another choice."""
    count = Counter(held.values())
    classes = {type(modules[path]) for path in held.values()}
    for holder, path in held.items():
        inner = type(modules[holder])
        alone = count[path] == 1 and not any(other.startswith(f"{path}.") for other in held.values())
        alone &= inner in classes and not _is_of_torch(modules[holder])
        yield holder if alone else path


def _is_stage(path: str, chosen: set[str], lists: Lists) -> bool:
    """Whether a module holds blocks and a sum of its own that not all of its kind have: it pools them, for example."""
    alike = [other for other in lists.siblings(path) if any(p.startswith(f"{other}.") for p in chosen)]
    return path in alike and any(other not in chosen for other in alike)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _choose(around: list[str], lists: Lists) -> str:
    """The innermost member of a list, or of the list around it where the inner one holds the block's sub-layers."""
    inner = around[0]
    if len(around) < 2 or lists.is_alike(inner) or not lists.is_alike(around[1]):
        return inner
    several = len(lists.siblings(around[1])) > 1 and len(lists.siblings(inner)) <= 3
    return around[1] if several else inner


def _is_within(one: str, other: str) -> bool:
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _ordered(graph: Graph, paths: set[str], order: list[str]) -> list[Block]:
    first: dict[str, int] = {}
    for call in graph.calls:
        if call.path in paths:
            first.setdefault(call.path, call.index)
    place = {path: i for i, path in enumerate(order)}
    found = []
    for path in sorted(paths, key=place.__getitem__):
        found.append(Block(path, first=first.get(path, -1)))
    ran = {block.path: float(block.first) for block in found if block.first >= 0}
    for block in found:
        if block.first < 0:  # behind the sibling before it
            before = [p for p in ran if parent(p) == parent(block.path) and place[p] < place[block.path]]
            ran[block.path] = ran[before[-1]] + 1e-3 if before else -1.0
    return sorted(found, key=lambda block: (ran[block.path], place[block.path]))


def around(path: str, found: dict[str, Block]) -> Block | None:
    """The block that a module stands in."""
    while path:
        if path in found:
            return found[path]
        path = parent(path)
    return None
