"""Mixtures of experts in a sub-layer: which products route words, and which are the experts' own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mmpeft.sites.graph import Graph
from mmpeft.sites.mlp import Assignment, up_and_gate, width
from mmpeft.sites.record import PICKS, SLICES, VIEWS, Op
from mmpeft.sites.streams import Sublayer

CHOICES = frozenset({"topk", "argmax", "max", "sort"})
"""What picks the experts of a word."""
MEETINGS = frozenset({"mul", "bmm", "mm", "baddbmm", "where"})
"""Where the result of an expert meets its weight."""


def experts(graph: Graph, sub: Sublayer, modules: Mapping[str, nn.Module]) -> Assignment | None:
    """Roles `expert.*` and `router` of a sub-layer's products; None where it has no experts.

    Experts are products by one matrix of a three-dimensional parameter or by all of them, and modules of a list to
    which a router sends words. Of a parameter that many products read, one is in the answer.
    """
    stacked = [op for op in sub.products if is_stacked(op)]
    routers = [op for op in sub.products if not is_stacked(op) and _chooses(graph, op, sub)]
    own = stacked or [op for op in sub.products if op not in routers and _is_listed(graph, op, sub, modules, routers)]
    if not own:
        return None
    found: Assignment = {}
    ones = list({op.weight.name: op for op in reversed(own) if op.weight}.values())[::-1]
    inside = {op.index for op in ones}
    for end in ones:
        if any(op.index in inside for op in graph.ahead(end.index)):
            continue
        through = graph.activations(end)[0]
        first = [op for op in graph.behind(through) if op.index in inside and op is not end]
        network: Assignment = {"expert.down": [(end, None)], **up_and_gate(graph, first, through, "expert")}
        for role, products in network.items() if first else ():
            found.setdefault(role, []).extend(products)
    if not found:
        return None
    before = [op for op in sub.products if op not in routers and _leads_to(graph, op, routers)]
    weighing = [op for op in sub.products if width(op) == 1 and op not in own]
    behind = [op for op in sub.products if not is_stacked(op)]
    ends = [op for op, _ in found["expert.down"]]
    if not (routers or weighing) and any(graph.is_above(end.index, op.index) for end in ends for op in behind):
        return None  # heads of a sub-layer that each have their own matrix: nothing is sent to them
    found["router"] = [(op, None) for op in {op.index: op for op in (*routers, *before, *weighing)}.values()]
    return found


def is_stacked(op: Op) -> bool:
    """Whether a product reads one matrix of a three-dimensional parameter, or all of them."""
    known = op.weight
    return known is not None and known.stacked and not known.derived and op.name not in ("convolution", "embedding")


def bias_of(graph: Graph, op: Op) -> str:
    """The tensor [experts, o] of which each expert adds its own row to a product by its matrix."""
    todo = [op.index]
    while todo:
        index = todo.pop()
        for user in (graph.ops[i] for i in graph.users[index]):
            if user.name in VIEWS | SLICES:
                todo.append(user.index)
            elif user.name == "add":
                for other in user.inputs:
                    found = graph.ops[other]
                    while found.name in VIEWS | SLICES | PICKS:
                        found = graph.ops[found.inputs[0]]
                    if found.name == "held" and len(found.shape) == 2:
                        return found.label
    return ""


def _chooses(graph: Graph, op: Op, sub: Sublayer) -> bool:
    """Whether a choice is made by the result of a product."""
    todo, seen, inside = list(graph.users[op.index]), set(), sub.indices
    while todo:
        user = graph.ops[todo.pop()]
        if user.name in CHOICES:
            return True
        if user.index in inside and user.index not in seen and user.weight is None:
            seen.add(user.index)
            todo += graph.users[user.index]
    return False


def _leads_to(graph: Graph, op: Op, routers: list[Op]) -> bool:
    """Whether all that comes of a product goes into routers."""
    ahead = graph.ahead(op.index)
    return bool(ahead) and all(user in routers for user in ahead)


def _is_listed(graph: Graph, op: Op, sub: Sublayer, modules: Mapping[str, nn.Module], routers: list[Op]) -> bool:
    """Whether a product is by a member of a list, and its input or its result depends on a router."""
    assert op.weight is not None
    if not routers or not member(op.weight.name, modules):
        return False
    if any(graph.is_above(router.index, op.index) for router in routers):
        return True
    return _is_weighed(graph, op, sub, routers)


def member(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The innermost module around a parameter that stands beside others in a list."""
    path = name.rpartition(".")[0]
    while path:
        above, _, number = path.rpartition(".")
        holder = modules.get(above)
        if number.isdigit() and isinstance(holder, nn.ModuleList) and len(holder) > 1:
            return path
        path = above
    return ""


def _is_weighed(graph: Graph, op: Op, sub: Sublayer, routers: list[Op]) -> bool:
    """Whether the result of a product, or of the next ones, is multiplied by what a router gave."""
    todo, seen, inside = list(graph.users[op.index]), set(), sub.indices
    while todo:
        user = graph.ops[todo.pop()]
        if user.index not in inside or user.index in seen:
            continue
        seen.add(user.index)
        if user.name in MEETINGS and user.weight is None:
            others = [i for i in user.inputs if not graph.is_above(op.index, i)]
            if any(graph.is_above(router.index, i) for router in routers for i in others):
                return True
        if user.name not in ("add", "index_add", "index_put"):
            todo += graph.users[user.index]
    return False
