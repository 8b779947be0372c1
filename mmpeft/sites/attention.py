"""Attentions in a recorded pass: a softmax between two products, and the projections around it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmpeft.sites.graph import JOINTS, Graph
from mmpeft.sites.record import PRODUCTS, SOFTMAX, Op


@dataclass
class Attention:
    """One attention: the products of its queries, keys and values, and those that read what it gives."""

    center: int
    """The softmax."""
    value: int
    """The product with the values."""
    score: int
    """The product of queries and keys."""
    operands: dict[str, tuple[int, int]]
    """Of `q`, `k` and `v`, the tensor that enters the attention: the operation that made it, and its identity."""
    sources: dict[str, list[Op]]
    """Of each, the nearest products by a weight."""
    outs: list[Op] = field(default_factory=list)
    """The nearest products by a weight that read what it gives, within its sub-layer."""
    soft: bool = True
    """Whether there is a softmax; else `center` and `score` are the first of two products."""


def attentions(graph: Graph, residual: frozenset[int]) -> list[Attention]:
    """Every attention of a pass; `residual` are the sums behind which another sub-layer begins."""
    centers = [op for op in graph.ops if op.name in SOFTMAX]
    known = [one for op in centers if (one := _soft(graph, op)) is not None]
    # queries that begin as the model's own constants attend to one another by projections all the same
    found = [one for one in known if not graph.ops[one.center].static or all(one.sources.values())]
    for one in found:
        one.outs = graph.ahead(one.value, residual)
    return found


def is_joint(op: Op) -> bool:
    """Whether an operation is a product of two activations."""
    return op.name in JOINTS and op.weight is None and len(op.inputs) >= 2


def _nearest(graph: Graph, start: int, ahead: bool) -> Op | None:
    """The nearest product of two activations; not past products by weights, unless (talking heads) by one."""
    for patience in (0, 1):
        todo = [(i, patience) for i in (graph.users[start] if ahead else graph.ops[start].inputs)]
        seen: set[int] = set()
        constant: Op | None = None
        while todo:
            i, left = todo.pop(0)
            if i in seen:
                continue
            seen.add(i)
            op = graph.ops[i]
            if is_joint(op):
                if not any(graph.ops[j].static for j in op.inputs[-2:]):
                    return op
                constant = constant or op
                continue
            if op.weight is not None and op.name in JOINTS | {"addmm", "linear", "convolution"}:
                left -= 1
            elif op.name in PRODUCTS or (op.name in SOFTMAX and i != start):
                continue
            if left >= 0:
                todo += [(j, left) for j in (graph.users[i] if ahead else graph.activations(op))]
        if constant is not None:
            return constant
    return None


def _soft(graph: Graph, softmax: Op) -> Attention | None:
    score, value = _nearest(graph, softmax.index, False), _nearest(graph, softmax.index, True)
    if score is None or value is None or not graph.is_above(softmax.index, value.index):
        return None
    first, second = graph.read(score)[-2:]
    axis = softmax.args[1] if len(softmax.args) > 1 else -1
    across = isinstance(axis, int) and axis % max(1, len(softmax.shape)) != len(softmax.shape) - 1
    queries, keys = (second, first) if across else (first, second)
    mixed = [pair for pair in graph.read(value)[-2:] if not graph.is_above(softmax.index, pair[0])]
    if not mixed:
        return None
    operands = {"q": queries, "k": keys, "v": mixed[0]}
    sources = {name: graph.behind(i) for name, (i, _) in operands.items()}
    return Attention(softmax.index, value.index, score.index, operands, sources)
