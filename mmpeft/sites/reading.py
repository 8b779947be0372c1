"""The reading of a recorded pass: which sites a model has. No backbone is named here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mmpeft.hosting.modules import own_modules
from mmpeft.sites.attention import attentions
from mmpeft.sites.blocks import Block, blocks
from mmpeft.sites.builder import Builder
from mmpeft.sites.graph import Graph
from mmpeft.sites.linear import linear_attentions
from mmpeft.sites.mlp import width
from mmpeft.sites.outside import finish, rest
from mmpeft.sites.projections import projections
from mmpeft.sites.record import Record
from mmpeft.sites.roles import Reading, channels_of
from mmpeft.sites.site import Site
from mmpeft.sites.streams import sublayers
from mmpeft.sites.sublayers import apart, sublayer
from mmpeft.sites.towers import name_towers
from mmpeft.types import Kwargs

PAIR = "the block takes and returns two streams; a single tensor does not hold its tokens"
NO_TOKENS = "no anatomy says that a prompt has a place among what its blocks see"


@dataclass
class _Builder(Builder):
    tower_of: Callable[[str], str] = str

    def outside(self, path: str, around: str) -> str:
        return self.tower_of(path)


def read(model: nn.Module, record: Record) -> list[Site]:
    """The sites of a model, from what was seen of one pass; named tensors (role `param`) are not among them."""
    modules = dict(own_modules(model))
    graph = Graph(record, frozenset(path for path, module in modules.items() if isinstance(module, nn.Dropout)))
    subs = apart(graph, sublayers(graph))
    found = _outermost(graph, {block.path: block for block in blocks(graph, modules, subs)})
    residual = frozenset(sub.sum for sub in subs)
    known = attentions(graph, residual)
    reading = Reading(graph, modules, subs, [*known, *linear_attentions(graph, subs, known)], found)
    name_towers(reading.graph, reading.subs, list(found.values()))
    builder = _Builder(model, reading.tower_of(""))
    builder.tower_of = reading.tower_of
    for block in found.values():
        _block(reading, builder, block)
    for sub in subs:
        sublayer(reading, builder, sub)
    rest(reading)
    projections(reading, builder)
    for path, tower in _stacks(list(found.values())):
        builder.tower = tower
        builder.add(path, "stack")
    builder.tower = reading.tower_of("")
    return finish(reading, builder)


def _outermost(graph: Graph, found: dict[str, Block]) -> dict[str, Block]:
    """Without what only runs inside other blocks, which share it: an encoding of positions."""
    alone: dict[str, bool] = {}
    for call in graph.calls:
        if call.path in found:
            index = call.parent
            while index >= 0 and graph.calls[index].path not in found:
                index = graph.calls[index].parent
            alone[call.path] = alone.get(call.path, False) or index < 0
    return {path: block for path, block in found.items() if alone.get(path, True)}


def _block(reading: Reading, builder: Builder, block: Block) -> None:
    builder.tower = block.tower
    alike = next((b for b in reading.blocks.values() if b.first >= 0 and _alike(reading, b, block)), block)
    call = reading.graph.calls[block.first if block.first >= 0 else alike.first]
    inside = [p for p in reading.graph.products if call.first <= p.index < call.last]
    known: Kwargs = {"below": True} if block.below else {}
    size = 0
    if inside and call.shapes:
        shape = call.shapes[0]
        last = next((p for p in reversed(inside) if width(p) > 1 and width(p) in shape), inside[-1])
        spatial = any(p.name == "convolution" for p in (inside if len(shape) > 3 else [last]))
        size, dim = channels_of(shape, width(last), spatial)
        before = reading.graph.ops[call.reads[0]].shape if call.reads else ()
        entering = before[dim] if len(before) == len(shape) else size
        known |= {"channel_dim": dim if dim == 1 else -1, **({"inputs": entering} if entering != size else {})}
    sums = {reading.graph.root(sub.sum) for sub in reading.subs}
    if len({reading.graph.root(i) for i in call.gives} & sums) > 1:
        known["refuse"] = PAIR
    builder.block(block.path, block.depth, size, **known)
    builder.add(block.path, "tokens", block.depth, refuse=NO_TOKENS)


def _alike(reading: Reading, one: Block, other: Block) -> bool:
    return type(reading.modules[one.path]) is type(reading.modules[other.path])


def _stacks(found: list[Block]) -> list[tuple[str, str]]:
    """(path, tower) of the modules that hold all blocks of a tower."""
    stacks: dict[str, str] = {}
    for tower in dict.fromkeys(block.tower for block in found):
        paths = [block.path.split(".") for block in found if block.tower == tower]
        common = []
        for names in zip(*paths):
            if len(set(names)) > 1:
                break
            common.append(names[0])
        if len(paths) == 1:
            common = common[:-1]
        tops = [".".join(common)] if common else list(dict.fromkeys(names[0] for names in paths))
        for top in tops:
            stacks.setdefault(top, tower)
    return list(stacks.items())
