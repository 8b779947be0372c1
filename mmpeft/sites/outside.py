"""What stands outside sub-layers: embeddings, heads, what rests and what never runs."""

from __future__ import annotations

from dataclasses import replace

from mmpeft.sites.attention import Attention
from mmpeft.sites.blocks import around, parent, pattern
from mmpeft.sites.builder import Builder, is_norm, is_projection
from mmpeft.sites.experts import experts, is_stacked
from mmpeft.sites.graph import Graph
from mmpeft.sites.record import Op
from mmpeft.sites.replay import channels
from mmpeft.sites.roles import UNREAD, Reading
from mmpeft.sites.site import Site
from mmpeft.sites.streams import Sublayer
from mmpeft.sites.sublayers import mixed

LEVELS = 2
"""Modules around experts among which their router is."""
NOT_RUN = "the watched pass did not run it"


def rest(reading: Reading) -> None:
    """Products without a role of their own: outside blocks by their place, inside by their kind."""
    graph = reading.graph
    for one in reading.attentions:
        if reading.block_of(graph.ops[one.center]) is not None:
            _in_block(reading, one)
        for name, sources in one.sources.items() if reading.block_of(graph.ops[one.center]) is None else ():
            for source in sources:
                if graph.returned >> source.index & 1 and not is_projection(reading.owner(source)):  # for several uses
                    reading.assign(source, "proj", channels(graph, source, one.operands[name]))
    for op in graph.products:
        if is_stacked(op) and not reading.is_assigned(op):
            _without_stream(reading, op)
    ends = _ends(reading)
    last = max((graph.calls[b.first].last for b in reading.blocks.values() if b.first >= 0), default=0)
    for op in graph.products:
        assert op.weight is not None
        if reading.is_assigned(op):
            if reading.rest(op):
                reading.assign(op, "proj")
            continue
        block = reading.block_of(op)
        inputs = [o for o in graph.inputs if graph.is_above(o.index, op.index)]
        if not graph.returned >> op.index & 1:
            reading.assign(op, "dead")
        elif inputs and all(len(o.shape) <= 1 for o in inputs):
            reading.assign(op, "time")
        elif op.name == "embedding":
            words = bool(inputs) and block is None and graph.ops[graph.root(op.inputs[1])].name == "input"
            reading.assign(op, "embed" if words else "table")
        elif block is not None:
            reading.assign(op, "conv" if op.name == "convolution" else "proj")
        elif inputs and not (op.static or op.index > last or _is_behind_products(graph, op)):
            reading.assign(op, "embed")
        elif _is_head(reading, op, ends):
            reading.assign(op, "head")
        else:
            reading.assign(op, "proj")


def _without_stream(reading: Reading, op: Op) -> None:
    """Roles of experts outside the sub-layers of a stream: with what runs in the nearest module that has a router."""
    assert op.weight is not None
    owner = op.weight.name.rpartition(".")[0]
    around = [call for call in reading.graph.around(op.index) if call.path != owner][:LEVELS]
    subs = [Sublayer(c.last, c.first, op.index, reading.graph.ops[c.first : c.last]) for c in around]
    found = [(sub, experts(reading.graph, sub, reading.modules)) for sub in subs]
    mixtures = [one for one in found if one[1]]
    chosen = next((one for one in mixtures if one[1] and one[1]["router"]), mixtures[0] if mixtures else None)
    if chosen is not None:
        mixed(reading, chosen[0])


def _in_block(reading: Reading, one: Attention) -> None:
    """Roles of an attention in a block that is added to no stream: the first one of queries that begin as zeros."""
    graph = reading.graph
    if any(reading.is_assigned(op) for sources in one.sources.values() for op in sources):
        return
    roots = {name: {graph.root(i) for op in one.sources[name] for i in graph.activations(op)} for name in "qk"}
    role = "attn" if roots["q"] & roots["k"] else "cross"
    for name, sources in one.sources.items():
        for source in sources:
            if reading.block_of(source) is not None:
                reading.assign(source, f"{role}.{name}", channels(graph, source, one.operands[name]))
    for out in one.outs:
        if reading.block_of(out) is not None and not reading.is_assigned(out):
            reading.assign(out, f"{role}.out")


def _is_behind_products(graph: Graph, op: Op) -> bool:
    return bool(graph.above(op.index) & ~(1 << op.index) & graph.product_bits)


def _is_head(reading: Reading, op: Op, ends: list[int]) -> bool:
    """Whether a product reads what all towers give, and none comes behind it."""
    graph = reading.graph
    last = not any(p.index > op.index and graph.is_above(op.index, p.index) for p in graph.products)
    return is_projection(reading.owner(op)) and last and all(graph.is_above(i, op.index) for i in ends)


def _ends(reading: Reading) -> list[int]:
    """The last result of each tower."""
    found: dict[str, int] = {}
    for block in reading.blocks.values():
        call = reading.graph.calls[block.first]
        if block.first >= 0 and call.gives:
            found[block.tower] = max(found.get(block.tower, -1), call.gives[0])
    return list(found.values())


def finish(reading: Reading, builder: Builder) -> list[Site]:
    """What rested takes after its siblings, what never runs is said to be dead; norms, and the order of the model."""
    called = {call.path for call in reading.graph.calls}
    covered = {site.path for site in builder.sites if site.kind in ("linear", "conv")}
    read = {op.label for op in reading.graph.ops if op.name == "held"}
    models: dict[str, list[Site]] = {}
    for site in builder.sites:
        if site.kind in ("linear", "conv"):
            models.setdefault(pattern(site.path), []).append(site)
    for path, module in reading.modules.items():
        if path in covered or path in called or f"{path}.weight" in read:
            continue
        block = around(path, reading.blocks)
        depth, builder.tower = (block.depth, block.tower) if block else (-1, reading.tower_of(path))
        if is_projection(module):
            alike = models.get(pattern(path), []) if _rests(reading, path, called) else []
            first = alike[0].path if alike else ""
            for site in alike:
                if site.path == first:
                    builder.sites.append(replace(site, path=path, depth=depth, tower=builder.tower))
            if not alike:
                builder.linear(path, "proj", depth, dead=True, refuse=NOT_RUN)
        elif is_norm(module) and not _rests(reading, path, called):
            builder.add(path, "norm", depth, kind="norm", dead=True, refuse=NOT_RUN)
    _resting_stacks(reading, builder)
    unread = _unread(reading)
    return [
        replace(site, dead=True, refuse=UNREAD) if site.role == "norm" and site.path in unread else site
        for site in builder.finish()
    ]


def _unread(reading: Reading) -> set[str]:
    """Modules that ran, of which nothing reaches what the model returns."""
    graph = reading.graph
    ran = {call.path for call in graph.calls if call.gives}
    return ran - {call.path for call in graph.calls if any(graph.returned >> i & 1 for i in call.gives)}


def _resting_stacks(reading: Reading, builder: Builder) -> None:
    """Experts of which no word was sent to any are sites as those of their like."""
    known: dict[tuple[str, type], dict[str, list[Site]]] = {}
    for site in builder.sites:
        if site.kind == "experts":
            own = known.setdefault((pattern(site.path), type(reading.modules[site.path])), {})
            own.setdefault(site.path, []).append(site)
    for path, module in reading.modules.items():
        alike = known.get((pattern(path), type(module)), {})
        if alike and path not in alike:
            block = around(path, reading.blocks)
            depth, tower = (block.depth, block.tower) if block else (-1, reading.tower_of(path))
            for site in next(iter(alike.values())):
                builder.sites.append(replace(site, path=path, depth=depth, tower=tower))


def _rests(reading: Reading, path: str, called: set[str]) -> bool:
    """Whether a module is (in) the member of a list of which others ran: an expert that no word was routed to."""
    while path and parent(path) not in called and path.rpartition(".")[2].isdigit() is False:
        path = parent(path)
    return any(other in called for other in called if parent(other) == parent(path) and pattern(other) == pattern(path))
