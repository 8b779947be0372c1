"""Attention without softmax: two products of activations, chained along one sub-layer."""

from __future__ import annotations

from collections.abc import Iterable

from mmpeft.sites.attention import Attention, is_joint
from mmpeft.sites.graph import Graph
from mmpeft.sites.record import PRODUCTS, Op
from mmpeft.sites.replay import channels, is_grouped, over_positions, share, spread
from mmpeft.sites.streams import Sublayer

DECAYS = frozenset({"cumsum", "cumprod", "logcumsumexp"})
"""What is summed up along positions weighs them, and is no query, key or value."""

Operand = tuple[int, int]
Found = dict[str, tuple[Operand, list[Op]]]
"""Of `q`, `k` and `v`, what enters the attention and the products that make it."""


def linear_attentions(graph: Graph, subs: Iterable[Sublayer], known: list[Attention]) -> list[Attention]:
    """One attention of each sub-layer that has none with a softmax and chains two products of activations."""
    residual = frozenset(sub.sum for sub in subs)
    taken = {one.center for one in known}
    found = [_linear(graph, sub, residual) for sub in subs if not taken & sub.indices]
    return [one for one in found if one is not None]


def _linear(graph: Graph, sub: Sublayer, residual: frozenset[int]) -> Attention | None:
    inside = sub.indices
    joints = [op for op in sub.ops if _is_moving(graph, op)]
    known: Found = {}
    last: tuple[Op, Op] | None = None
    for first in joints:
        for second in _next(graph, first, inside):
            own = _roles(graph, first, second, inside)
            for name, entering in own.items():
                known.setdefault(name, entering)
            if own and (last is None or second.index > last[1].index):
                last = first, second
    if last is None or len(known) < 3:
        return None
    if _is_scan(graph, sub, known["v"][0]):
        return None
    first, second = last
    operands = {name: known[name][0] for name in "kvq"}  # queries last: they may be known only as scores
    sources = {name: known[name][1] for name in "kvq"}
    return Attention(
        first.index, second.index, first.index, operands, sources, graph.ahead(second.index, residual), soft=False
    )


def _is_scan(graph: Graph, sub: Sublayer, values: Operand) -> bool:
    """Whether one step size decays the state and weighs what enters it, as in a state space model."""
    decays = [graph.read(op)[0] for op in sub.ops if op.name in DECAYS and not op.static]
    steps = [_rows(graph, pair, _behind(graph, pair, sub.indices)) for pair in decays]
    return bool(steps) and any(_rows(graph, values, _behind(graph, values, sub.indices)) & own for own in steps)


def _is_moving(graph: Graph, op: Op) -> bool:
    return is_joint(op) and not any(graph.ops[i].static for i in op.inputs[-2:])


def _next(graph: Graph, first: Op, inside: frozenset[int]) -> list[Op]:
    """The nearest products of activations of which one factor comes from a product of activations."""
    todo, seen, found = list(graph.users[first.index]), set(), []
    while todo:
        i = todo.pop()
        op = graph.ops[i]
        if i in seen or i not in inside:
            continue
        seen.add(i)
        if is_joint(op):
            if _is_moving(graph, op) and sum(graph.is_above(first.index, j) for j in op.inputs[-2:]) == 1:
                found.append(op)
        elif op.name not in PRODUCTS:
            todo += graph.users[i]
    return sorted(found, key=lambda op: op.index)


def _roles(graph: Graph, first: Op, second: Op, inside: frozenset[int]) -> Found:
    """What the factors of two products are: of the result of the first, the second sums over one dimension.

    The factor of the first that this is the free dimension of has the keys.
    """
    pairs = graph.read(second)[-2:]
    which = 0 if graph.is_above(first.index, pairs[0][0]) else 1
    summed = (-1, -2)[which]
    masks = [spread(graph, first, pairs[which], dim, 0) for dim in (-2, -1)]
    if masks[0] is None or masks[1] is None or not (masks[0].any() and masks[1].any()):
        return {}
    shares = [share(mask, summed) for mask in masks if mask is not None]
    if shares[0] == shares[1]:
        return {}
    left = shares[0] < shares[1]
    one, two = graph.read(first)[-2:]
    keys, partner = (one, two) if left else (two, one)
    others = pairs[1 - which]
    made = _sources(graph, keys, inside)
    state = over_positions(graph, made[0], keys, -1 if left else -2) if made else None
    if state is None:
        return {}
    named = {"q": others, "k": keys, "v": partner} if state else {"q": partner, "k": keys, "v": others}
    found = {name: (pair, _sources(graph, pair, inside)) for name, pair in named.items()}
    rows = {name: _rows(graph, pair, sources) for name, (pair, sources) in found.items()}
    scores = "q" if state else "v"
    if rows[scores] & rows["k"]:  # scores that were made entry by entry, of queries and of the keys that weighed values
        own = [op for op in found[scores][1] if not _rows(graph, others, [op]) <= rows["k"]]
        found = {"k": found["k"], "v": (partner, _sources(graph, partner, inside)), "q": (others, own)}
    elif rows["q"] & rows["k"]:  # keys that meet themselves: nothing is known of them but the values that they weigh
        found = {"v": found["v"]}
    if any(_rows(graph, *found[name]) <= rows["k"] for name in "qv" if name in found):
        return {}
    return {name: own for name, own in found.items() if own[1]}


def _rows(graph: Graph, operand: Operand, sources: list[Op]) -> set[tuple[str, int]]:
    return {(op.weight.name, c) for op in sources if op.weight for c in channels(graph, op, operand, DECAYS)}


def _sources(graph: Graph, operand: Operand, inside: frozenset[int]) -> list[Op]:
    """The nearest products behind a factor, gates of whole heads left out."""
    found = _behind(graph, operand, inside)
    sizes = {op.index: len(channels(graph, op, operand, DECAYS)) for op in found}
    most = max(sizes.values(), default=0)
    return [op for op in found if 2 * sizes[op.index] >= most]


def _behind(graph: Graph, operand: Operand, inside: frozenset[int]) -> list[Op]:
    """The nearest products behind a tensor; convolutions in groups pass on."""
    todo, seen, found = [operand[0]], set(), []
    while todo:
        i = todo.pop()
        op = graph.ops[i]
        if i in seen or i not in inside or op.name in DECAYS:
            continue
        seen.add(i)
        if op.weight is not None and not is_grouped(op):
            found.append(op)
        elif op.weight is not None or op.name not in PRODUCTS:
            todo += graph.activations(op)
    return sorted(found, key=lambda op: op.index)
