"""Where learned keys and values can enter an attention: by the torch functions that it is made of."""

from __future__ import annotations

from dataclasses import replace

from mmpeft.sites.attention import Attention, is_joint
from mmpeft.sites.builder import Builder
from mmpeft.sites.graph import Graph
from mmpeft.sites.record import VIEWS, Function, Op
from mmpeft.sites.replay import over_positions

OTHER = (
    "its attention is neither one scaled_dot_product_attention nor a softmax between two 4-D products, so that learned "
    "keys have no way in; where the model has a choice of implementations, take sdpa or eager"
)
WEIGHTS = (
    "it is asked for its weights (need_weights=True), so that its attention is not one scaled_dot_product_attention "
    "and learned keys have no way in"
)
MIXED = (
    "between its scores and its values it does more than a softmax (heads are mixed, positions weighed), in which "
    "learned keys would have no part"
)
LINEAR = (
    "its attention has no softmax: keys and values are summed up, and learned ones would have no share of their own"
)
CHANNELS = "it attends to channels, whose keys are as long as the text or picture: learned ones would fit one length"
UNEQUAL = "its keys and values are of different widths; learned ones are of one"
SUMMED = (
    "its scores are a sum of several products (relative positions are one), and learned keys would be multiplied in "
    "one that nothing tells from the others"
)
SEVERAL = "it computes several attentions in one pass, and learned keys would enter only one"


def keys_and_values(builder: Builder, graph: Graph, one: Attention, centers: list[int], depth: int) -> None:
    """The `kv` site of an attention, in the module that was running; `centers` are those of all attentions."""
    call = next(graph.holding([one.score, one.center, one.value]))
    heads, width = _shape(graph, one)
    held = next((i for i, s in enumerate(builder.sites) if s.role == "kv" and s.path == call.path), None)
    if held is None:
        why = LINEAR if not one.soft else _refusal(graph, one) if heads else _no_way_in(graph, one)
        builder.add(call.path, "kv", depth, heads=heads, width=width, refuse=why)
    elif sum(call.first <= other < call.last for other in centers) > 1:
        builder.sites[held] = replace(builder.sites[held], refuse=SEVERAL)


def _refusal(graph: Graph, one: Attention) -> str:
    """Why learned keys and values do not fit in an attention although there is a way in."""
    if _is_over_channels(graph, one):
        return CHANNELS
    (_, first), (_, second) = graph.shapes(graph.ops[one.score])[-2:]
    shares, values = (shape for _, shape in graph.shapes(graph.ops[one.value])[-2:])
    if first[-1] == second[-2] != values[-1]:
        return UNEQUAL
    before = graph.between(one.score, one.center)[:-1]
    behind = graph.between(one.center, one.value)[:-1]
    if any(op.name in ("add", "baddbmm") and _adds_product(graph, one, op) for op in before):
        return SUMMED
    if not all(_follows(graph, op) for op in before) or any(op.name not in VIEWS for op in behind):
        return MIXED
    if shares[-2:] != graph.ops[one.score].shape[-2:] or first[-1] != second[-2]:
        return OTHER  # the product is written the other way round
    return ""


def _is_over_channels(graph: Graph, one: Attention) -> bool:
    """Whether the product of queries and keys sums over positions."""
    summed = (-1, -2)[graph.read(graph.ops[one.score])[-2:].index(one.operands["k"])]
    made = [op for op in one.sources["k"] if graph.is_above(op.index, one.operands["k"][0])]
    return bool(made) and bool(over_positions(graph, made[0], one.operands["k"], summed))


def _adds_product(graph: Graph, one: Attention, op: Op) -> bool:
    """Whether what is added to scores is another product of the queries."""
    queries = [source.index for source in one.sources["q"]]
    others = [i for i in op.inputs if not graph.is_above(one.score, i)]
    between = [o for q in queries for i in others for o in graph.between(q, i)]
    return any(is_joint(o) for o in between)


def _follows(graph: Graph, op: Op) -> bool:
    """Whether what is done to scores can be done to those of learned keys: it says nothing of single keys."""
    if op.name in ("mul", "div"):
        return all(shape[-1:] in ((), (1,)) for _, shape in graph.shapes(op) if shape != op.shape)
    return op.name in VIEWS | {"add", "sub", "tanh", "masked_fill", "where"}


def _shape(graph: Graph, one: Attention) -> tuple[int, int]:
    """(heads, features of each) of the keys that the functions are given; zeros if they are others."""
    around = [f for f in graph.record.functions if f.first <= one.center < f.last]
    for function in around:
        if function.name == "scaled_dot_product_attention" and len(function.shapes[1]) == 4:
            return function.shapes[1][1], function.shapes[1][-1]
    values = [f for f in graph.record.functions if f.first <= one.value < f.last and f.name == "matmul"]
    if any(f.name == "softmax" for f in around) and values and len(values[0].shapes[0]) == 4:
        scores = _matmul_of_scores(graph, one)
        if scores is not None and [len(shape) for shape in scores.shapes] == [4, 4]:
            return scores.shapes[1][1], scores.shapes[1][-2]
    return 0, 0


def _no_way_in(graph: Graph, one: Attention) -> str:
    own = [f for f in graph.record.functions if f.name == "multi_head_attention_forward"]
    return WEIGHTS if any(f.first <= one.center < f.last for f in own) else OTHER


def _matmul_of_scores(graph: Graph, one: Attention) -> Function | None:
    return next((f for f in graph.record.functions if f.name == "matmul" and f.first <= one.score < f.last), None)
