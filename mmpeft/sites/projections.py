"""Sites of products by a parameter: how the backbone reads it, which rows serve the role, what is added to them."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from mmpeft.functional.rows import Rows, count_rows
from mmpeft.sites.blocks import around
from mmpeft.sites.builder import Builder, is_projection
from mmpeft.sites.experts import bias_of, is_stacked
from mmpeft.sites.graph import Graph
from mmpeft.sites.mlp import width
from mmpeft.sites.record import SLICES, VIEWS, Op
from mmpeft.sites.replay import as_rows
from mmpeft.sites.roles import UNREAD, Reading
from mmpeft.types import Kwargs

DERIVED = "the pass multiplies by entries that it looks up or computes from this table: it is no matrix of a product"
STACKED = "it holds several matrices, of which each position or head takes its own"


def projections(reading: Reading, builder: Builder) -> None:
    """A site for each product by a parameter that can be tuned as a matrix."""
    for name, own in reading.roles.items():
        for (role, _), (op, used) in own.items():
            _site(reading, builder, name, role, op, used)


def _site(reading: Reading, builder: Builder, name: str, role: str, op: Op, used: set[int]) -> None:
    assert op.weight is not None
    path, tensor, computed = _owner(reading, op, name)
    module = reading.modules[path]
    block = around(path, reading.blocks) or reading.block_of(op)
    depth, builder.tower = (block.depth, block.tower) if block else (-1, reading.tower_of(path))
    known: Kwargs = {}
    if role == "table":
        return
    if role == "dead":
        role, known = "proj", {"dead": True, "refuse": UNREAD}
    if op.name == "embedding":
        builder.add(path, role, depth, kind="embedding", transposed=True, width=op.weight.shape[1], tensor=tensor)
        return
    parameter = module._parameters.get(tensor)
    plain = is_projection(module) and tensor == "weight"
    if parameter is None and not computed:
        return
    why = "" if plain or is_stacked(op) else _no_matrix(op, parameter)  # type: ignore[arg-type]  # there by now
    if why:
        builder.add(path, role, depth, kind="param", tensor=tensor, **{"refuse": why, **known})
        return
    apart = any(
        by.call != op.call and prod(reading.graph.ops[vector].shape) == width(op)
        for vector, by, _ in _added_behind(reading.graph, op)
    )
    own = computed or not op.weight.derived
    called = plain and own and not apart and reading.graph.path(op) == path
    rows = _rows(used, reading.rows(op))
    if rows is Ellipsis:
        rows, role = None, "proj"
    if not called:
        known |= {"via": "weight"}
    if not called or (rows is not None and module._parameters.get("bias") is None):
        known |= {"bias": bias_of(reading.graph, op) if is_stacked(op) else _bias(reading.graph, op, rows)}
    kind = "conv" if op.name == "convolution" else "experts" if is_stacked(op) else "linear"
    builder.add(path, role, depth, kind=kind, rows=rows, tensor=tensor, transposed=op.weight.transposed, **known)


def _owner(reading: Reading, op: Op, name: str) -> tuple[str, str, bool]:
    """(module, tensor) of a product's weight, and whether a parametrisation computes it from the tensors it keeps."""
    path, _, tensor = name.rpartition(".")
    outer = path.removesuffix(".parametrizations.weight")
    assert op.weight is not None
    kept = outer != path or (tensor.startswith("weight_") and "weight" not in reading.modules[path]._parameters)
    if op.weight.derived and kept and is_projection(reading.modules[outer]):
        return outer, "weight", True
    return path, tensor, False


def _no_matrix(op: Op, parameter: nn.Parameter) -> str:
    """Why a parameter cannot be tuned as a matrix although the pass multiplies by (what is made of) it."""
    assert op.weight is not None
    own, read = tuple(parameter.shape), op.weight.shape
    if op.weight.derived and sorted(own) != sorted(read):
        return DERIVED
    return STACKED if parameter.dim() != 2 and op.name != "convolution" else ""


def _rows(used: set[int], total: int) -> Any:
    """The rows of a role; Ellipsis where they follow no period."""
    try:
        return as_rows(sorted(used), total)
    except ValueError:
        return Ellipsis


def _bias(graph: Graph, op: Op, rows: Rows | None) -> str:
    """The tensor that is added to a product's own rows."""
    own = [i for i in op.inputs if len(graph.ops[i].shape) == 1 and graph.ops[i].static]
    if not own:
        size = width(op) if rows is None else count_rows(rows, width(op))
        own = [i for i, _, _ in _added_behind(graph, op) if prod(graph.ops[i].shape) in (size, width(op))]
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
    """Vectors of the model's own that are added to a product or a slice of it: (vector, sum, what it is added to)."""
    todo, found = [op.index], []
    while todo:
        index = todo.pop()
        for user in (graph.ops[i] for i in graph.users[index]):
            if user.name == "add" and _is_alone(graph, user, index):  # else it is used without them too
                vectors = [i for i in user.inputs if graph.ops[i].static and _is_vector(graph, op, i)]
                found += [(i, user, index) for i in vectors[:1]]
            elif user.name in VIEWS | SLICES:
                todo.append(user.index)
    return found


def _is_vector(graph: Graph, op: Op, index: int) -> bool:
    """Whether a tensor has one number for each channel of a product: along its last dimension, or where it has them."""
    shape = graph.ops[index].shape
    return len(shape) == 1 or (op.channel == -2 and len(shape) > 1 and prod(shape) == shape[-2])


def _is_alone(graph: Graph, user: Op, index: int) -> bool:
    """Whether no other operation reads the tensor that one reads of a result."""
    own = {pair for pair in graph.read(user) if pair[0] == index}
    return all(other == user.index or not own & set(graph.read(graph.ops[other])) for other in graph.users[index])
