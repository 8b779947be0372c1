"""What a model is made of, put together for people: its towers, blocks that are alike as one, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from mmpeft.functional.rows import Rows, count_rows
from mmpeft.hosting.host import base_value, original_class
from mmpeft.hosting.modules import module_at, own_parameters
from mmpeft.sites import Site

TENSORS = ("linear", "conv", "embedding")
"""Kinds of site that own a matrix or a kernel."""


@dataclass(frozen=True)
class Line:
    """Sites with one role at one place of a block, in all blocks that are alike; `count` of them in each block.

    `path` is seen from the block, with a star for numbers that differ.
    """

    role: str
    path: str
    kind: str
    via: str
    refuse: str
    dead: bool
    count: int
    sites: tuple[Site, ...] = field(compare=False)
    shapes: tuple[tuple[int, ...], ...] = field(compare=False)
    """One for each site."""

    @property
    def rows(self) -> Rows | None:
        """The rows of a fused projection, where all sites have the same."""
        found = {site.rows for site in self.sites}
        return found.pop() if len(found) == 1 else None

    @property
    def is_fused(self) -> bool:
        return any(site.rows is not None for site in self.sites)


@dataclass(frozen=True)
class Fold:
    """Blocks that have the same sites, if of other widths: how deep they stand, and what their paths have in common."""

    depths: tuple[int, ...]
    path: str
    lines: tuple[Line, ...]

    @property
    def numbers(self) -> str:
        """`0-11`, `0, 2-5`."""
        runs: list[list[int]] = []
        for depth in self.depths:
            if runs and depth == runs[-1][-1] + 1:
                runs[-1].append(depth)
            else:
                runs.append([depth])
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

    @property
    def title(self) -> str:
        """`blocks 0-11 (12 alike)`."""
        several = len(self.depths) > 1
        return f"blocks {self.numbers} ({len(self.depths)} alike)" if several else f"block {self.numbers}"


@dataclass(frozen=True)
class Tower:
    """Blocks along one stream, in the order of their first, and the sites of the tower before and behind them."""

    name: str
    before: tuple[Line, ...]
    folds: tuple[Fold, ...]
    behind: tuple[Line, ...]
    parameters: int

    @property
    def blocks(self) -> int:
        return sum(len(fold.depths) for fold in self.folds)

    @property
    def title(self) -> str:
        return self.name or ("model" if self.folds else "outside towers")

    @property
    def lines(self) -> tuple[Line, ...]:
        return (*self.before, *(line for fold in self.folds for line in fold.lines), *self.behind)


@dataclass(frozen=True)
class Overview:
    """A model for people. `rest` are tensors with two dimensions or more of which no site but `param` knows."""

    name: str
    cls: str
    parameters: int
    seconds: float
    towers: tuple[Tower, ...]
    rest: tuple[tuple[str, tuple[int, ...], int], ...]
    small: int
    """Parameters of the other tensors that only `param` knows: biases and scales."""

    @property
    def lines(self) -> Iterable[Line]:
        for tower in self.towers:
            yield from tower.lines


def overview(name: str, model: nn.Module, found: Sequence[Site], seconds: float, shown: Sequence[Site]) -> Overview:
    """Put `found`, all sites of a model, together; of them `shown` are listed."""
    structural = [site for site in found if site.role != "param"]
    wanted = {id(site) for site in shown}
    block_of = _blocks(structural)
    by_tower: dict[str, dict[tuple[int, str], list[Site]]] = {}
    for site in structural:
        own = by_tower.setdefault(site.tower, {})
        if id(site) in wanted:
            own.setdefault(block_of(site), []).append(site)
    sizes = {tensor: value.numel() for tensor, value in _tensors(model).items()}
    owners = towers_of_tensors(found)
    towers = []
    for tower, blocks in by_tower.items():
        before, behind = _outside(blocks.pop((-1, ""), []), structural)
        parameters = sum(size for tensor, size in sizes.items() if owners.get(tensor, "") == tower)
        outside = [tuple(_lines(model, [("", own)])) for own in (before, behind)]
        towers.append(Tower(tower, outside[0], tuple(_folds(model, blocks)), outside[1], parameters))
    rest, small = _uncovered(model, structural)
    towers.sort(key=lambda tower: not tower.folds)
    return Overview(name, original_class(model).__name__, sum(sizes.values()), seconds, tuple(towers), rest, small)


def _outside(own: Sequence[Site], structural: Sequence[Site]) -> tuple[list[Site], list[Site]]:
    """Sites outside blocks: those in front, as the model holds them, and the rest."""
    tower = own[0].tower if own else ""
    first = next((i for i, site in enumerate(structural) if site.role == "block" and site.tower == tower), 0)
    stacks = tuple(f"{site.path}." for site in own if site.role == "stack")
    early = {id(s) for s in structural[:first] if s.role == "norm" and not s.path.startswith(stacks)}
    before = [site for site in own if site.role in ("embed", "time", "stack") or id(site) in early]
    return before, [site for site in own if site not in before]


def _blocks(structural: Sequence[Site]) -> Callable[[Site], tuple[int, str]]:
    """What gives the block of a site: its depth and path; of one outside blocks -1 and nothing."""
    depths = {site.path: site.depth for site in structural if site.role == "block"}
    shared = {(site.tower, site.depth): site.path for site in reversed(structural) if site.role == "block"}

    def block_of(site: Site) -> tuple[int, str]:
        path = site.path
        while path and path not in depths:
            path = path.rpartition(".")[0]
        if path in depths:
            return depths[path], path
        return (site.depth, shared.get((site.tower, site.depth), "")) if site.depth >= 0 else (-1, "")

    return block_of


def shape_of(model: nn.Module, site: Site) -> tuple[int, ...]:
    """Of a matrix or kernel the site's own rows as it is stored, output first; of other sites heads and width."""
    if site.kind not in TENSORS:
        return tuple(size for size in (site.heads, site.width) if size)
    value = base_value(module_at(model, site.path), site.tensor)
    shape = tuple(value.shape)
    if site.transposed and site.kind == "linear":
        shape = (*shape[:-2], shape[-1], shape[-2])
    return shape if len(shape) != 2 and site.rows is None else (count_rows(site.rows, shape[0]), *shape[1:])


def pattern(path: str) -> str:
    """A path with the numbers of lists left open; a name with a number stays what it is."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def common(paths: Iterable[str]) -> str:
    """What paths that differ in numbers have in common: a star for each number in which they do."""
    columns = [list(dict.fromkeys(parts)) for parts in zip(*(path.split(".") for path in paths))]
    return ".".join(own[0] if len(own) == 1 else re.sub(r"\d+", "*", own[0]) for own in columns)


def _folds(model: nn.Module, blocks: dict[tuple[int, str], list[Site]]) -> Iterable[Fold]:
    """Blocks with one place and the same sites together, in the order of their first."""
    alike: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    for (depth, path), own in sorted(blocks.items()):
        alike.setdefault((re.sub(r"\d+", "*", path), *_lines(model, [(path, own)])), []).append((depth, path))
    for same in alike.values():
        lines = _lines(model, [(path, blocks[depth, path]) for depth, path in same])
        yield Fold(tuple(depth for depth, _ in same), common(path for _, path in same), tuple(lines))


def _lines(model: nn.Module, blocks: Sequence[tuple[str, Iterable[Site]]]) -> list[Line]:
    """The sites of blocks that are alike, in the order of the first block."""
    groups: dict[tuple[str, str, str, str, str, bool], list[tuple[str, Site]]] = {}
    for block, own in blocks:
        own = list(own)
        streams = {site.stream for site in own}
        for site in own:
            path = site.path[len(block) + 1 :] if block and f"{site.path}.".startswith(f"{block}.") else site.path
            if site.kind in TENSORS and site.tensor != "weight":
                path = f"{path}.{site.tensor}".lstrip(".")
            via = "weight" if site.via == "weight" else ""
            form = path if site.path in streams else pattern(path)  # each norm before a sub-layer is its own
            groups.setdefault((site.role, form, site.kind, via, site.refuse, site.dead), []).append((path, site))
    found = []
    for (role, _, kind, via, refuse, dead), same in groups.items():
        sites = tuple(site for _, site in same)
        shapes = tuple(shape_of(model, site) for site in sites)
        path = common(path for path, _ in same)
        found.append(Line(role, path, kind, via, refuse, dead, len(same) // len(blocks), sites, shapes))
    return found


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by the first of its names."""
    seen: set[int] = set()
    found = {}
    for name, parameter in own_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def towers_of_tensors(found: Iterable[Site]) -> dict[str, str]:
    """The tower of each named tensor: that of its block, or of a site outside blocks that reads it."""
    found = list(found)
    outside = {site.path: site.tower for site in found if site.depth < 0 and site.role not in ("stack", "param")}
    named = [site for site in found if site.role == "param"]
    return {site.path: site.tower or outside.get(site.path.rpartition(".")[0], "") for site in named}


def _uncovered(
    model: nn.Module, structural: Iterable[Site]
) -> tuple[tuple[tuple[str, tuple[int, ...], int], ...], int]:
    """(path pattern, shape, how many) of tensors that no site but `param` reaches, and parameters of the small ones."""
    known = {f"{site.path}.{site.tensor}".lstrip(".") for site in structural if site.kind in TENSORS}
    norms = {site.path for site in structural if site.kind == "norm"}
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    small = 0
    for name, tensor in _tensors(model).items():
        if name in known or name.rpartition(".")[0] in norms:
            continue
        if tensor.dim() > 1:
            key = (pattern(name), tuple(tensor.shape))
            groups[key] = groups.get(key, 0) + 1
        else:
            small += tensor.numel()
    return tuple((path, shape, count) for (path, shape), count in groups.items()), small
