"""Residual streams in a recorded pass: the sums that make them, and the sub-layers between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mmpeft.sites.graph import Graph
from mmpeft.sites.record import POOLS, SOFTMAX, Call, Op


@dataclass
class Sublayer:
    """What is added to a residual stream: the operations between the stream and the sum."""

    sum: int
    stream: int
    """The result that it branches from."""
    branch: int
    """The result that is added."""
    ops: list[Op] = field(default_factory=list)
    shared: bool = False
    """Whether another sub-layer beside it reads the result of one of its products."""

    @property
    def products(self) -> list[Op]:
        return [op for op in self.ops if op.weight is not None and op.name != "embedding"]

    @property
    def indices(self) -> frozenset[int]:
        return frozenset(op.index for op in self.ops)


def sublayers(graph: Graph) -> list[Sublayer]:
    """Every sub-layer of every residual stream, in order; a sum of two parallel ones gives both."""
    found: dict[int, Sublayer] = {}
    for op in graph.ops:
        if op.name in ("add", "addcmul"):
            own = _residual(graph, op, found)
            if own is not None:
                found[op.index] = own
    proper = _outer(graph, _streaming(graph, list(found.values())))
    return [piece for sub in proper for piece in _pieces(graph, sub)]


def _residual(graph: Graph, op: Op, known: dict[int, Sublayer]) -> Sublayer | None:
    """A sum one of whose terms is an ancestor of the other, or is such a sum and has the other's ancestor as stream."""
    terms = [i for i, shape in graph.shapes(op) if len(shape) >= 2 and shape == op.shape]
    if op.name == "addcmul":
        terms = terms[:1] + terms[-1:]
    if len(terms) != 2 or terms[0] == terms[1]:
        return None
    for branch, root in _roots(graph, terms, known):
        above = known.get(root)
        if not graph.is_above(root, branch) and above is not None:  # x + attention(x) + mlp(x)
            root = graph.root(above.stream)
        if root == branch or not graph.is_above(root, branch) or graph.root(branch) == root:
            continue
        between = _learning(graph, root, branch)
        if any((o.weight is not None and not o.static) or o.name in SOFTMAX | POOLS for o in between):
            return Sublayer(op.index, root, branch, between)
    return None


def _learning(graph: Graph, start: int, end: int) -> list[Op]:
    """Operations on a way from one result to another by which a gradient comes back: masks and choices hand on none."""
    between = graph.between(start, end)
    reached = {end}
    for op in reversed(between):
        if op.index in reached:
            reached.update(i for i in graph.activations(op) if graph.ops[i].is_floating)
    return [op for op in between if op.index in reached]


def _roots(graph: Graph, terms: list[int], known: dict[int, Sublayer]) -> Iterator[tuple[int, int]]:
    """Each term as the branch, and the result that the other, as the stream, is a view of.

    Where neither is one, of which the stream is a scaled or shifted copy, or a known sum that more tokens were put to.
    """
    pairs = [(terms[0], terms[1]), (terms[1], terms[0])]
    yield from ((branch, graph.root(stream)) for stream, branch in pairs)
    for stream, branch in pairs:
        root = graph.root(stream)
        while graph.ops[root].name in ("mul", "add") and len(moving := _moving(graph, root)) == 1:
            root = graph.root(moving[0])
        if root != graph.root(stream):
            yield branch, root
        elif graph.ops[root].name == "cat":
            yield from ((branch, i) for i in map(graph.root, graph.ops[root].inputs) if i in known)


def _moving(graph: Graph, index: int) -> list[int]:
    return [i for i in graph.ops[index].inputs if not graph.ops[i].static]


def _streaming(graph: Graph, found: list[Sublayer]) -> list[Sublayer]:
    """Without sums of a stream and positions, which look alike where positions went into the stream before.

    What is added to is then the branch: it goes on as the stream around the sum, or came there from elsewhere.
    """
    inside = {sub.sum: sub.indices for sub in found}
    around: dict[int, list[Sublayer]] = {}
    for sub in found:
        around.setdefault(sub.stream, []).append(sub)
    kept: list[Sublayer] = []
    for sub in found:
        own = inside[sub.sum]
        goes_on = any(sub.sum in inside[o.sum] for o in around.get(graph.root(sub.branch), ()))
        if not goes_on and not any(o.sum in own and o.stream not in own and o.stream != sub.stream for o in kept):
            kept.append(sub)
    return kept


def _outer(graph: Graph, found: list[Sublayer]) -> list[Sublayer]:
    """Without sums inside a sub-layer, and without those around a whole stack of sub-layers."""
    roots = {graph.root(sub.sum): sub for sub in found} | {sub.sum: sub for sub in found}
    inside = {
        sub.sum: [o for o in found if o.sum != sub.sum and o.sum in sub.indices and o.stream != sub.stream]
        for sub in found
    }
    around = {
        sub.sum
        for sub in found
        if any(
            graph.root(o.stream) in roots and roots[graph.root(o.stream)].sum in sub.indices for o in inside[sub.sum]
        )
    }
    kept = [sub for sub in found if sub.sum not in around]
    nested = {o.sum for sub in kept for o in inside[sub.sum]}
    return [sub for sub in kept if sub.sum not in nested]


def _pieces(graph: Graph, sub: Sublayer) -> list[Sublayer]:
    """A branch that is a sum of parallel sub-layers, which no module of its own makes, is several."""
    op = graph.ops[graph.root(sub.branch)]
    while op.name == "mul" and len(moving := [i for i in op.inputs if graph.is_above(sub.stream, i)]) == 1:
        op = graph.ops[graph.root(moving[0])]  # a scale of the whole
    terms = [i for i in op.inputs if len(graph.ops[i].shape) >= 2]
    if op.name == "sum" and graph.ops[terms[0]].name in ("stack", "cat"):
        terms = [graph.root(i) for i in graph.ops[terms[0]].inputs]
    elif op.name != "add":
        return [sub]
    if len(terms) < 2 or op.index not in sub.indices:
        return [sub]
    if any(call.first <= op.index < call.last <= sub.sum for call in graph.around(op.index)):
        return [sub]
    parts = [replace(sub, branch=i, ops=graph.between(sub.stream, i)) for i in terms]
    if not all(part.products for part in parts):
        return [sub]
    common = frozenset.intersection(*(part.indices for part in parts))
    shared = any(graph.ops[i].weight is not None for i in common)
    return [piece for part in parts for piece in _pieces(graph, replace(part, shared=shared))]


@dataclass
class Shell:
    """The modules of a sub-layer, as `Site` names them."""

    path: str
    entry: str = ""
    stream: str = ""
    out: str = ""
    shape: tuple[int, ...] = ()
    out_shape: tuple[int, ...] = ()
    call: Call | None = None


def shell(graph: Graph, sub: Sublayer) -> Shell | None:
    """Which module is a sub-layer, reads the stream first, and gives what is added; None if no module gives it."""
    pools = [op.index for op in sub.ops if op.name in POOLS]
    products = [op.index for op in sub.products] or pools or [op.index for op in sub.ops]
    inner = [call for call in graph.holding(products) if not call.first <= sub.sum < call.last]
    giving = [call for call in inner if sub.indices.issuperset(call.gives[:1]) and call.gives]
    whole = giving[-1 if pools and not sub.products else 0] if giving else None  # what pools may only do a part of it
    found = Shell("")
    if whole is not None:
        found.path, found.call = whole.path, whole
    else:
        last = [call for call in graph.around(products[-1]) if not call.first <= sub.sum < call.last]
        giving = [call for call in last if call.gives and call.gives[0] in sub.indices]
        if not giving:
            return None
        found.path, found.call = giving[-1].path, giving[-1]
        first = [call for call in graph.around(products[0]) if not call.first <= sub.sum < call.last]
        given = [call for call in first if call.reads and graph.is_above(sub.stream, call.reads[0])]
        if not given:
            return None
        found.entry = given[-1].path
    assert found.call is not None
    found.shape = found.call.shapes[0]
    found.out, shape = _giver(graph, sub, found.call)
    found.out_shape = shape
    stream, taken = _reader(graph, sub, found.call)
    found.stream = stream if taken == shape else ""  # what is made of the one is added to the other
    return found


def _reader(graph: Graph, sub: Sublayer, own: Call) -> tuple[str, tuple[int, ...]]:
    """The first module that is given the stream itself, works on it, and does not hold the sum; the stream's shape."""
    holder = next(graph.holding([*(op.index for op in sub.products), sub.sum]), None)
    for call in graph.calls[holder.index if holder else 0 :]:
        if call.first >= sub.sum:
            break
        if call.index < own.index and call.last >= own.last:
            continue  # around the whole sub-layer
        begins = call.last <= sub.sum and call.reads and graph.root(call.reads[0]) == sub.stream
        if begins and sub.indices & set(call.gives) and graph.runs_once(call):
            return call.path, call.given[0]
    return "", ()


def _giver(graph: Graph, sub: Sublayer, own: Call) -> tuple[str, tuple[int, ...]]:
    """The last module that gives what is added, and its shape; dropout gives what it is given and does not count."""
    branch = graph.root(sub.branch)
    behind = [call for call in graph.calls[own.index :] if own.last <= call.first and call.last <= sub.sum]
    giving = [call for call in behind if call.gives[:1] and graph.root(call.gives[0]) == branch]
    kept = [call for call in giving if call.path not in graph.dropouts and graph.runs_once(call)]
    return (kept[-1].path, kept[-1].shapes[0]) if kept else ("", own.shapes[0])
