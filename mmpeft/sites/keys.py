"""Where learned keys and values can enter an attention: by the torch functions that it is made of."""

from __future__ import annotations

from dataclasses import replace

from mmpeft.sites.attention import Attention
from mmpeft.sites.builder import Builder
from mmpeft.sites.graph import Graph
from mmpeft.sites.record import Function

OTHER = (
    "its attention is neither one scaled_dot_product_attention nor a softmax between two 4-D products, so that learned "
    "keys have no way in; where the model has a choice of implementations, take sdpa or eager"
)
SEVERAL = "it computes several attentions in one pass, and learned keys would enter only one"


def keys_and_values(builder: Builder, graph: Graph, one: Attention, centers: list[int], depth: int) -> None:
    """The `kv` site of an attention, in the module that was running; `centers` are those of all attentions."""
    call = next(graph.holding([one.score, one.center, one.value]))
    heads, width = _shape(graph, one)
    held = next((i for i, s in enumerate(builder.sites) if s.role == "kv" and s.path == call.path), None)
    if held is None:
        builder.add(call.path, "kv", depth, heads=heads, width=width, refuse="" if heads else OTHER)
    elif sum(call.first <= other < call.last for other in centers) > 1:
        builder.sites[held] = replace(builder.sites[held], refuse=SEVERAL)


def _shape(graph: Graph, one: Attention) -> tuple[int, int]:
    """(heads, features of each) of the keys that the functions are given; zeros if they are others."""
    around = [f for f in graph.record.functions if f.first <= one.center < f.last]
    for function in around:
        if function.name == "scaled_dot_product_attention" and len(function.shapes[1]) == 4:
            return function.shapes[1][1], function.shapes[1][-1]
        if function.name == "multi_head_attention_forward":
            return function.heads, function.shapes[0][-1] // function.heads
    values = [f for f in graph.record.functions if f.first <= one.value < f.last and f.name == "matmul"]
    if any(f.name == "softmax" for f in around) and values and len(values[0].shapes[0]) == 4:
        scores = _matmul_before(graph, one)
        if scores is not None and [len(shape) for shape in scores.shapes] == [4, 4]:
            return scores.shapes[1][1], scores.shapes[1][-2]
    return 0, 0


def _matmul_before(graph: Graph, one: Attention) -> Function | None:
    before = [f for f in graph.record.functions if f.name == "matmul" and f.last <= one.center]
    own = [f for f in before if graph.is_above(f.last - 1, one.center)]
    return own[-1] if own else None
