"""The reading of a recorded pass: which sites a model has. No backbone is named here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mmpeft.functional.rows import Rows, count_rows
from mmpeft.hosting.modules import own_modules
from mmpeft.sites.attention import Attention, attentions
from mmpeft.sites.blocks import Block, around, blocks, parent, pattern
from mmpeft.sites.builder import Builder, is_norm, is_projection
from mmpeft.sites.graph import Graph
from mmpeft.sites.keys import keys_and_values
from mmpeft.sites.mlp import feed_forward, is_pointwise, width
from mmpeft.sites.replay import as_rows, channels
from mmpeft.sites.site import Site
from mmpeft.sites.streams import Sublayer, shell, sublayers
from mmpeft.sites.towers import name_towers
from mmpeft.sites.watch import SLICES, VIEWS, Op, Record

UNREAD = "nothing that the model returns depends on it"
NOT_RUN = "the watched pass did not run it"
PAIR = "the block takes and returns two streams; a single tensor does not hold its tokens"
NO_TOKENS = "no anatomy says that a prompt has a place among what its blocks see"


@dataclass
class Reading:
    """Roles found so far: of each parameter, a product by it and its rows that serve each role."""

    graph: Graph
    modules: dict[str, nn.Module]
    subs: list[Sublayer]
    attentions: list[Attention]
    blocks: dict[str, Block]
    roles: dict[str, dict[tuple[str, int], tuple[Op, set[int]]]] = field(default_factory=dict)

    def owner(self, op: Op) -> nn.Module:
        """The module whose parameter a product reads."""
        assert op.weight is not None
        return self.modules[op.weight.name.rpartition(".")[0]]

    def rows(self, op: Op) -> int:
        """Output rows of the whole parameter that a product reads."""
        assert op.weight is not None
        path, _, tensor = op.weight.name.rpartition(".")
        parameter = self.modules[path]._parameters.get(tensor)
        if parameter is None or op.weight.derived or parameter.dim() != len(op.weight.shape):
            return width(op)
        return int(parameter.shape[1 if op.weight.transposed else 0])

    def assign(self, op: Op, role: str, used: list[int] | None = None) -> None:
        """Give a product (or some of its channels) a role; the first role of a row stays."""
        assert op.weight is not None
        own = self.roles.setdefault(op.weight.name, {})
        first = _first_row(op) if self.rows(op) != width(op) else 0
        wanted = {first + i for i in (range(width(op)) if used is None else used)}
        left = wanted - set().union(*(taken for _, taken in own.values()))
        if left:
            key = (role, min(left) if role == "proj" else 0)  # what nothing is known of stays as it is read
            own[key] = (op, left | own[key][1] if key in own else left)

    def rest(self, op: Op) -> set[int]:
        """Rows that a product reads and that have no role yet."""
        assert op.weight is not None
        first = _first_row(op) if self.rows(op) != width(op) else 0
        own = self.roles.get(op.weight.name, {})
        return set(range(first, first + width(op))) - set().union(*(taken for _, taken in own.values()))

    def is_assigned(self, op: Op) -> bool:
        return op.weight is not None and op.weight.name in self.roles

    def tower_of(self, path: str) -> str:
        """The tower of a module outside blocks: that of all blocks in the nearest module around it that has any."""
        while True:
            towers = {b.tower for b in self.blocks.values() if not path or b.path.startswith(f"{path}.")}
            if towers or not path:
                return towers.pop() if len(towers) == 1 else ""
            path = parent(path)

    def block_of(self, op: Op) -> Block | None:
        return around(self.graph.path(op), self.blocks)


@dataclass
class _Builder(Builder):
    tower_of: Callable[[str], str] = str

    def outside(self, path: str, around: str) -> str:
        return self.tower_of(path)


def read(model: nn.Module, record: Record) -> list[Site]:
    """The sites of a model, from what was seen of one pass; named tensors (role `param`) are not among them."""
    modules = dict(own_modules(model))
    graph = Graph(record, frozenset(path for path, module in modules.items() if isinstance(module, nn.Dropout)))
    subs = sublayers(graph)
    found = {block.path: block for block in blocks(graph, modules, subs)}
    residual = frozenset(sub.sum for sub in subs)
    reading = Reading(graph, modules, subs, attentions(graph, residual), found)
    name_towers(reading.graph, reading.subs, list(found.values()))
    builder = _Builder(model, reading.tower_of(""))
    builder.tower_of = reading.tower_of
    for block in found.values():
        _block(reading, builder, block)
    for sub in subs:
        _sublayer(reading, builder, sub)
    _rest(reading)
    _projections(reading, builder)
    for path, tower in _stacks(list(found.values())):
        builder.tower = tower
        builder.add(path, "stack")
    builder.tower = reading.tower_of("")
    return _finish(reading, builder)


def _block(reading: Reading, builder: Builder, block: Block) -> None:
    builder.tower = block.tower
    own = [
        sub for sub in reading.subs if _is_under(reading.graph.calls[reading.graph.ops[sub.sum].call].path, block.path)
    ]
    if not own or block.first < 0:
        alike = next((b for b in reading.blocks.values() if b.first >= 0 and _alike(reading, b, block)), None)
        call = reading.graph.calls[block.first if block.first >= 0 or alike is None else alike.first]
    else:
        call = reading.graph.calls[block.first]
    last = max(
        (p for p in reading.graph.products if call.first <= p.index < call.last), default=None, key=lambda p: p.index
    )
    known: dict[str, Any] = {}
    size = 0
    if last is not None and call.shapes:
        spatial = any(p.name == "convolution" for p in reading.graph.products if call.first <= p.index < call.last)
        size, dim = _channels(call.shapes[0], width(last), spatial)
        before = reading.graph.ops[call.reads[0]].shape if call.reads else ()
        entering = before[dim] if len(before) == len(call.shapes[0]) else size
        known = {"channel_dim": dim if dim == 1 else -1, **({"inputs": entering} if entering != size else {})}
    sums = {reading.graph.root(sub.sum) for sub in reading.subs}
    if len({reading.graph.root(i) for i in call.gives} & sums) > 1:
        known["refuse"] = PAIR
    builder.block(block.path, block.depth, size, **known)
    builder.add(block.path, "tokens", block.depth, refuse=NO_TOKENS)


def _alike(reading: Reading, one: Block, other: Block) -> bool:
    return type(reading.modules[one.path]) is type(reading.modules[other.path])


def _is_under(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _channels(shape: tuple[int, ...], size: int, convolution: bool) -> tuple[int, int]:
    """(how many channels, in which dimension) of a result, from the width of the product that made it."""
    last = len(shape) - 1
    order = (1, last) if convolution and len(shape) > 2 else (last, 1)
    for dim in order:
        if dim <= last and shape[dim] == size:
            return size, dim if dim != last else -1
    dim = order[0]
    return (shape[dim] if shape else size), dim if dim != last else -1


def _sublayer(reading: Reading, builder: Builder, sub: Sublayer) -> None:
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
        role = "cross" if across else "attn"
        for name, sources in one.sources.items():
            for source in sources:
                if source.index in sub.indices or across or source.static:
                    reading.assign(source, f"{role}.{name}", channels(graph, source, one.operands[name]))
        for out in one.outs:
            if out.index in sub.indices:
                reading.assign(out, f"{role}.out")
                _beside(reading, one, out, role)
                _network_beside(reading, one, out)
        keys_and_values(builder, graph, one, [a.center for a in reading.attentions], depth)
    given = {p.index for p in sub.products if reading.is_assigned(p)}
    network = None if within else feed_forward(graph, sub, given)
    if network is not None:
        for name, products in network.items():
            for product, used in products:
                reading.assign(product, name, used)
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
    _shell(reading, builder, sub, role, depth)


def _beside(reading: Reading, one: Attention, out: Op, role: str) -> None:
    """What else of a fused projection reaches the output projection: a gate on the attention, or a network beside it."""
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


def _network_beside(reading: Reading, one: Attention, out: Op) -> None:
    """A product of its own that meets the attention in one output projection is the network beside it."""
    graph = reading.graph
    for op in graph.behind(graph.activations(out)[0]):
        if not graph.is_above(one.value, op.index) and is_pointwise(op) and not reading.is_assigned(op):
            reading.assign(op, "mlp.up")


def _mixer(reading: Reading, sub: Sublayer) -> None:
    """A sub-layer without attention that is no feed-forward network: what mixes positions, and what leads in and out."""
    graph, linears = reading.graph, [p for p in sub.products if is_pointwise(p) and p.name != "convolution"]
    if len(linears) > 1:
        ends = [op for op in graph.behind(sub.branch) if op in linears]
        for op in linears:
            behind = [p for p in graph.behind(graph.activations(op)[0]) if p.index in sub.indices]
            if op in ends:
                reading.assign(op, "mixer.out")
            elif not behind:
                reading.assign(op, "mixer.in")


def _shell(reading: Reading, builder: Builder, sub: Sublayer, role: str, depth: int, inside: bool = False) -> None:
    found = shell(reading.graph, sub)
    roles = {role for p in sub.products if p.weight for role, _ in reading.roles.get(p.weight.name, ())}
    if found is None or not sub.products or sub.shared or (role != "mlp" and "mlp.up" in roles):
        return
    last = sub.products[-1]
    size, dim = _channels(found.shape, width(last), last.name == "convolution")
    branch = reading.graph.ops[sub.branch]
    if role == "mlp" and size not in branch.shape:  # it works on positions
        role = "mixer"
    known = {} if inside else {"stream": found.stream, "out": found.out, "entry": found.entry}
    builder.add(found.path, role, depth, width=size, channel_dim=dim, **known)


def _rest(reading: Reading) -> None:
    """Products without a role of their own: outside blocks by their place, inside by their kind."""
    graph = reading.graph
    outputs = 0
    for i in graph.record.outputs:
        outputs |= graph.above(i)
    for one in reading.attentions:
        for name, sources in one.sources.items() if reading.block_of(graph.ops[one.center]) is None else ():
            for source in sources:
                if not is_projection(reading.owner(source)):  # one tensor for several uses
                    reading.assign(source, "proj", channels(graph, source, one.operands[name]))
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
        if not outputs >> op.index & 1:
            reading.assign(op, "dead")
        elif inputs and all(len(o.shape) <= 1 for o in inputs):
            reading.assign(op, "time")
        elif op.name == "embedding":
            reading.assign(
                op,
                "embed"
                if inputs and block is None and graph.ops[graph.root(op.inputs[1])].name == "input"
                else "table",
            )
        elif block is not None:
            reading.assign(op, "conv" if op.name == "convolution" else "proj")
        elif inputs and not (
            op.static or op.index > last or graph.above(op.index) & ~(1 << op.index) & graph.product_bits
        ):
            reading.assign(op, "embed")
        elif _is_head(reading, op, ends):
            reading.assign(op, "head")
        else:
            reading.assign(op, "proj")


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


def _projections(reading: Reading, builder: Builder) -> None:
    """A site for each product by a parameter that can be tuned as a matrix."""
    for name, own in reading.roles.items():
        for (role, _), (op, used) in own.items():
            _site(reading, builder, name, role, op, used)


def _site(reading: Reading, builder: Builder, name: str, role: str, op: Op, used: set[int]) -> None:
    assert op.weight is not None
    path, _, tensor = name.rpartition(".")
    module = reading.modules[path]
    block = around(path, reading.blocks) or reading.block_of(op)
    depth, builder.tower = (block.depth, block.tower) if block else (-1, reading.tower_of(path))
    known: dict[str, Any] = {}
    if role == "table":
        return
    if role == "dead":
        role, known = "proj", {"dead": True, "refuse": UNREAD}
    if op.name == "embedding":
        builder.add(path, role, depth, kind="embedding", transposed=True, width=op.weight.shape[1], tensor=tensor)
        return
    parameter = module._parameters.get(tensor)
    plain = is_projection(module) and tensor == "weight"
    if (
        parameter is None
        or (parameter.dim() == 3 and not plain)
        or (op.weight.derived and not is_conv_or_linear(module, tensor))
    ):
        return
    apart = any(
        by.call != op.call and reading.graph.ops[vector].shape[0] == width(op)
        for vector, by, _ in _added_behind(reading.graph, op)
    )
    called = plain and reading.graph.path(op) == path and not op.weight.derived and not apart
    rows = _rows(used, reading.rows(op))
    if rows is Ellipsis:
        rows, role = None, "proj"
    if not called:
        known |= {"via": "weight"}
    if not called or (rows is not None and module._parameters.get("bias") is None):
        known |= {"bias": _bias(reading.graph, op, rows)}
    kind = "conv" if op.name == "convolution" else "linear"
    builder.add(path, role, depth, kind=kind, rows=rows, tensor=tensor, transposed=op.weight.transposed, **known)


def is_conv_or_linear(module: nn.Module, tensor: str) -> bool:
    return is_projection(module) and tensor == "weight"


def _rows(used: set[int], total: int) -> Any:
    """The rows of a role; Ellipsis where they follow no period."""
    try:
        return as_rows(sorted(used), total)
    except ValueError:
        return Ellipsis


def _first_row(op: Op) -> int:
    """Of a product by a part of a parameter, the row at which that begins."""
    assert op.weight is not None
    columns = op.weight.shape[-1 if op.name in ("linear", "convolution") else 0]
    return op.weight.offset // max(1, columns)


def _bias(graph: Graph, op: Op, rows: Rows | None) -> str:
    """The tensor that is added to a product's own rows."""
    own = [i for i in op.inputs if len(graph.ops[i].shape) == 1 and graph.ops[i].static]
    if not own:
        size = width(op) if rows is None else count_rows(rows, width(op))
        own = [i for i, _, _ in _added_behind(graph, op) if graph.ops[i].shape[0] in (size, width(op))]
    if not own:
        return ""
    source = own[0]
    made = graph.ops[graph.root(source)]
    while made.name in SLICES:
        made = graph.ops[graph.root(made.inputs[0])]
    if made.name != "cat":
        return made.label
    start = 0
    for i in made.inputs:
        size = graph.ops[i].shape[0]
        if rows is not None and rows[:2] == (start, start + size):
            return graph.ops[graph.root(i)].label
        start += size
    return ""


def _added_behind(graph: Graph, op: Op) -> list[tuple[int, Op, int]]:
    """Vectors of the model's own that are added to a product, all of it or a slice: (vector, sum, what it is added to)."""
    todo, found = [op.index], []
    while todo:
        index = todo.pop()
        for user in (graph.ops[i] for i in graph.users[index]):
            if user.name in ("add", "add_"):
                vectors = [i for i in user.inputs if len(graph.ops[i].shape) == 1 and graph.ops[i].static]
                found += [(i, user, index) for i in vectors[:1]]
            elif user.name in VIEWS | SLICES:
                todo.append(user.index)
    return found


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


def _finish(reading: Reading, builder: Builder) -> list[Site]:
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
    return builder.finish()


def _rests(reading: Reading, path: str, called: set[str]) -> bool:
    """Whether a module is (in) the member of a list of which others ran: an expert that no word was routed to."""
    while path and parent(path) not in called and path.rpartition(".")[2].isdigit() is False:
        path = parent(path)
    return any(other in called for other in called if parent(other) == parent(path) and pattern(other) == pattern(path))
