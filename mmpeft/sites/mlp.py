"""Feed-forward networks in a sub-layer: which products are its first, its gate and its last."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from mmpeft.sites.graph import Graph
from mmpeft.sites.record import SLICES, VIEWS, Op
from mmpeft.sites.replay import channels, is_grouped, position_dim, spread
from mmpeft.sites.streams import Sublayer

POINTWISE = frozenset({"silu", "gelu", "relu", "sigmoid", "hardswish", "hardsigmoid", "leaky_relu", "elu", "celu"})
POINTWISE |= {"selu", "mish", "softplus", "tanh", "hardtanh", "pow", "square", "threshold", "erf", "exp", "softsign"}
POINTWISE |= {"log_sigmoid", "_prelu_kernel", "prelu", "clamp", "clamp_min", "abs"}
"""What makes a gate of one of two factors."""
POSITIONWISE = POINTWISE | VIEWS | SLICES | {"mul", "add", "native_layer_norm", "native_dropout"}
"""What leaves every position to itself; slices do where nothing puts positions elsewhere."""

Assignment = dict[str, list[tuple[Op, list[int] | None]]]
"""Of each role, its products and their channels (None: all)."""


def is_pointwise(op: Op) -> bool:
    """Whether a product acts on every position alone: a linear, or a convolution of size one."""
    if op.weight is None or op.name == "embedding" or (op.weight.derived and op.name == "bmm"):
        return False
    return op.name != "convolution" or (prod(op.weight.shape[2:]) == 1 and not is_grouped(op))


def width(op: Op) -> int:
    """Output channels of a product."""
    return op.shape[op.channel]


def which(op: Op) -> int:
    """Which of the tensors that a product reads is what it multiplies."""
    return 1 if op.name in ("addmm", "baddbmm") or (op.weight is not None and op.weight.left) else 0


def positions(op: Op) -> int:
    return prod(op.shape) // max(1, width(op))


def feed_forward(graph: Graph, sub: Sublayer, given: set[int]) -> Assignment | None:
    """The network at the end of a sub-layer: `down`, and `up` or `up` and `gate` before it; None where there is none.

    `given` are products that serve another purpose.
    """
    inside = sub.indices
    ends = [op for op in graph.behind(sub.branch) if op.index in inside and op.index not in given]
    shut = _gate(graph, ends, sub.branch) if len(ends) == 2 else None  # a gate on what the network gives
    ends = [op for op in ends if op is not shut]
    if len(ends) != 1 or not is_pointwise(ends[0]):
        return None
    end = ends[0]
    through = graph.activations(end)[0]
    first = [op for op in graph.behind(through) if op.index in inside and op is not end]
    middle: list[Op] = []
    if len(first) == 1 and is_grouped(first[0]) and end.name != "convolution":
        middle = first  # a depthwise convolution between two linears
        first = [op for op in graph.behind(graph.activations(middle[0])[0]) if op.index in inside]
    if not first or not all(is_pointwise(op) for op in first):
        return None
    if len({positions(op) for op in (*first, end)}) != 1 or any(width(op) == 1 for op in first):
        return None
    if all(op.index in given for op in first) and len(first) == 1:  # attention's own rows are in the same product
        return {
            "mlp.down": [(end, None)],
            "mlp.up": [(first[0], channels(graph, first[0], graph.read(end)[which(end)]))],
        }
    if any(op.index in given for op in first) or graph.mixes_behind(through):
        return None
    if not middle and any(_mixes(graph, op, end) for op in first):
        return None
    found: Assignment = {"mlp.down": [(end, None)], **up_and_gate(graph, first, through, "mlp")}
    if shut is not None:
        found.setdefault("mlp.gate", []).append((shut, None))
    if middle:
        found["conv"] = [(op, None) for op in middle]
    return found


def _mixes(graph: Graph, first: Op, end: Op) -> bool:
    """Whether one position of a product arrives at others where the next one reads: by a scan, or a product."""
    if all(op.name in POSITIONWISE for op in graph.between(first.index, graph.activations(end)[0])):
        return False
    target, dim = graph.read(end)[which(end)], position_dim(first)
    length = first.shape[dim]
    mask = spread(graph, first, target, dim, length // 3)
    if mask is None:
        return False
    channel = 1 if end.name == "convolution" else -1 - (end.channel == -2)
    return not mask.any() or float(mask.any(channel).float().mean()) > 1.01 / length


def networks(graph: Graph, sub: Sublayer, given: set[int]) -> Assignment:
    """Feed-forward networks inside a sub-layer that is more: those that end in products of no other purpose."""
    found: Assignment = {}
    taken = set(given)
    for end in reversed([op for op in sub.products if op.index not in given and is_pointwise(op)]):
        inner = replace(sub, branch=end.index, ops=[op for op in sub.ops if op.index <= end.index])
        network = feed_forward(graph, inner, taken) if end.index not in taken else None
        ups = [op for role in ("mlp.up", "mlp.gate") for op, _ in (network or {}).get(role, ())]
        through = graph.activations(end)[0]
        if (
            network is None
            or taken & {op.index for op in ups}
            or not any(_activated(graph, op.index, through) for op in ups)
        ):
            continue
        for role, products in network.items():
            found.setdefault(role, []).extend(products)
            taken |= {op.index for op, _ in products}
    return found


def up_and_gate(graph: Graph, first: list[Op], end: int, part: str) -> Assignment:
    """Which products (or channels of one) lead up to a result, and which gate it: roles `<part>.up` and `.gate`."""
    up, gate = f"{part}.up", f"{part}.gate"
    halves = [_halves(graph, op, end) for op in first]
    both = [(op, own) for op, own in zip(first, halves) if own is not None]
    if both and len(both) == len(first):
        return {up: [(op, own[0]) for op, own in both], gate: [(op, own[1]) for op, own in both]}
    gating = _gate(graph, first, end) if len(first) == 2 else None
    if gating is None:
        return {up: [(op, None) for op in first]}
    return {up: [(op, None) for op in first if op is not gating], gate: [(gating, None)]}


def _halves(graph: Graph, source: Op, end: int) -> tuple[list[int], list[int]] | None:
    """Channels of the two factors, ungated and gated, of a product that is both; None where it is one."""
    between = graph.between(source.index, end)
    for op in between:
        factors = [pair for pair in graph.read(op) if graph.is_above(source.index, pair[0])]
        if op.name != "mul" or len(factors) != 2:
            continue
        used = [channels(graph, source, pair) for pair in factors]
        if used[0] and used[1] and not set(used[0]) & set(used[1]):
            gated = [_activated(graph, source.index, i) for i, _ in factors]
            return (used[1], used[0]) if gated[0] and not gated[1] else (used[0], used[1])
    return None


def _gate(graph: Graph, pair: list[Op], end: int) -> Op | None:
    """Of two products that meet in a multiplication, the one through the activation."""
    for i in range(end, pair[-1].index, -1):
        op = graph.ops[i]
        if op.name == "mul" and len(op.inputs) == 2 and graph.is_above(i, end):
            for gate, other in (pair, pair[::-1]):
                for factor, rest in (op.inputs, op.inputs[::-1]):
                    alone = graph.is_above(gate.index, factor) and not graph.is_above(other.index, factor)
                    if alone and graph.is_above(other.index, rest) and _activated(graph, gate.index, factor):
                        return gate
    return None


def _activated(graph: Graph, start: int, end: int) -> bool:
    return any(op.name in POINTWISE for op in graph.between(start, end))
