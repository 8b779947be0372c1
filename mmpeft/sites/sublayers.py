"""The sub-layers of a residual stream as sites: attention, feed-forward networks, what mixes positions otherwise."""

from __future__ import annotations

from dataclasses import replace

from mmpeft.sites.attention import Attention
from mmpeft.sites.builder import Builder
from mmpeft.sites.experts import experts
from mmpeft.sites.graph import Graph
from mmpeft.sites.keys import keys_and_values
from mmpeft.sites.mlp import Assignment, feed_forward, is_pointwise, networks, width
from mmpeft.sites.record import Op
from mmpeft.sites.replay import channels
from mmpeft.sites.roles import Reading, channels_of
from mmpeft.sites.streams import Sublayer, shell


def apart(graph: Graph, subs: list[Sublayer]) -> list[Sublayer]:
    """Sub-layers without those that they read: what is added to a stream on the way into another is its own."""
    found = []
    for sub in subs:
        inner = [o for o in subs if o.sum != sub.sum and o.stream == sub.stream and o.sum in sub.indices]
        if inner:
            start = max(o.sum for o in inner)
            sub = replace(sub, stream=start, ops=graph.between(start, sub.branch))
        found.append(sub)
    return [sub for sub in found if sub.ops]


def sublayer(reading: Reading, builder: Builder, sub: Sublayer) -> None:
    """Roles of a sub-layer's products, and the sub-layer itself."""
    graph = reading.graph
    op = graph.ops[sub.sum]
    block = reading.block_of(op) or next((b for p in sub.products if (b := reading.block_of(p))), None)
    if block is None and reading.blocks:
        return  # a pooling head's own: outside blocks roles go by place
    depth, builder.tower = (block.depth, block.tower) if block else (-1, "")
    within = [a for a in reading.attentions if a.center in sub.indices]
    role = "mixer"
    for one in within:
        queries, keys = (one.operands[name][0] for name in "qk")
        across = not graph.is_above(sub.stream, keys) and graph.is_above(sub.stream, queries)
        across = across and not _are_of_another(reading, one)
        role = "cross" if across else "attn"
        for name, sources in one.sources.items():
            for source in sources:
                if source.index in sub.indices or across or source.static:
                    reading.assign(source, f"{role}.{name}", channels(graph, source, one.operands[name]))
    for one in within:
        for out in one.outs:
            if out.index in sub.indices:
                reading.assign(out, f"{role}.out")
                _beside(reading, one, out, role)
                _another_beside(reading, one, out, role)
        keys_and_values(builder, graph, one, [a.center for a in reading.attentions], depth)
    mixture = not within and mixed(reading, sub)
    given = {p.index for p in sub.products if reading.is_assigned(p)}
    network = None if within else feed_forward(graph, sub, given)
    behind = networks(graph, sub, given) if within else {}
    _assign(reading, behind)
    if mixture:
        role = "mlp"
        _assign(reading, network or {})  # what every word passes through
    elif network is not None:
        _assign(reading, network)
        served = {p.index for products in network.values() for p, _ in products}
        if all(p.index in served or p.name != "convolution" for p in sub.products):
            role = "mlp"
        else:  # a convolution before it: the network is a module inside the sub-layer
            first = network["mlp.up"][0][0].index
            sub = replace(sub, ops=[o for o in sub.ops if o.index >= first])
            _shell(reading, builder, sub, "mlp", depth, inside=True)
            return
    elif not within:
        _mixer(reading, sub)
    _shell(reading, builder, sub, role, depth, alone=not behind)


def mixed(reading: Reading, sub: Sublayer) -> bool:
    """Give the products of a mixture of experts their roles; whether there is one."""
    found = experts(reading.graph, sub, reading.modules)
    _assign(reading, found or {})
    return found is not None


def _assign(reading: Reading, found: Assignment) -> None:
    for role, products in found.items():
        for product, used in products:
            reading.assign(product, role, used)


def _are_of_another(reading: Reading, one: Attention) -> bool:
    """Whether keys are those that a self-attention before it has made: layers may share them."""
    roles = [set(reading.roles.get(op.weight.name, ())) for op in one.sources["k"] if op.weight]
    return bool(roles) and all(("attn.k", 0) in own for own in roles)


def _beside(reading: Reading, one: Attention, out: Op, role: str) -> None:
    """What else of a fused projection reaches the output projection: a gate on the attention, or a network."""
    graph = reading.graph
    for source in {op.index: op for sources in one.sources.values() for op in sources}.values():
        rest = reading.rest(source)
        for op in graph.between(one.value, out.index) if rest else ():
            others = [
                p for p in graph.read(op) if not graph.is_above(one.value, p[0]) and graph.is_above(source.index, p[0])
            ]
            for pair in others if op.name in ("mul", "cat") else ():
                used = [i for i in channels(graph, source, pair) if i in rest]
                reading.assign(source, f"{role}.gate" if op.name == "mul" else "mlp.up", used or None)
                rest = reading.rest(source)


def _another_beside(reading: Reading, one: Attention, out: Op, role: str) -> None:
    """A product of its own that meets the attention on the way to one output projection: a gate, or a network."""
    graph = reading.graph
    for op in graph.behind(graph.activations(out)[0]):
        if not graph.is_above(one.center, op.index) and is_pointwise(op) and not reading.is_assigned(op):
            way = graph.between(one.value, out.index)
            meeting = next((o for o in way if graph.is_above(op.index, o.index)), out)
            reading.assign(op, f"{role}.gate" if meeting.name == "mul" else "mlp.up")


def _mixer(reading: Reading, sub: Sublayer) -> None:
    """A sub-layer that is neither attention nor feed-forward network: what leads in and out."""
    graph, linears = reading.graph, [p for p in sub.products if is_pointwise(p) and p.name != "convolution"]
    if len(linears) > 1:
        ends = [op for op in graph.behind(sub.branch) if op in linears]
        for op in linears:
            behind = [p for p in graph.behind(graph.activations(op)[0]) if p.index in sub.indices]
            if op in ends:
                reading.assign(op, "mixer.out")
            elif not behind:
                reading.assign(op, "mixer.in")


def _shell(
    reading: Reading, builder: Builder, sub: Sublayer, role: str, depth: int, inside: bool = False, alone: bool = True
) -> None:
    found = shell(reading.graph, sub)
    roles = {role for p in sub.products if p.weight for role, _ in reading.roles.get(p.weight.name, ())}
    outside = reading.block_of(reading.graph.ops[sub.sum]) is None
    if found is None or (outside and any(path.startswith(f"{found.path}.") for path in reading.blocks)):
        return  # a sum around blocks is no sub-layer of any
    if sub.shared or (role != "mlp" and alone and "mlp.up" in roles):
        return
    if sub.products:
        last = sub.products[-1]
        size, dim = channels_of(found.shape, width(last), last.name == "convolution")
    else:  # pooling, of pictures or of words
        dim = 1 if len(found.shape) > 3 else -1
        size = found.shape[dim]
    branch = reading.graph.ops[sub.branch]
    if size not in branch.shape:
        if role in ("attn", "cross"):
            return  # what its last module gives is not yet what is added
        role = "mixer" if role == "mlp" else role  # it works on positions
    out = found.out if len(found.out_shape) > abs(dim) and found.out_shape[dim] == size else ""
    known = {} if inside else {"stream": found.stream, "out": out, "entry": found.entry}
    if found.call is not None and not reading.graph.runs_once(found.call):  # of which run is not said by a module
        known = {"entry": found.entry}
    builder.add(found.path, role, depth, width=size, channel_dim=dim, **known)
