"""Roles of a model's products while its pass is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from torch import nn

from mmpeft.sites.attention import Attention
from mmpeft.sites.blocks import Block, around, parent
from mmpeft.sites.experts import is_stacked
from mmpeft.sites.graph import Graph
from mmpeft.sites.mlp import width
from mmpeft.sites.record import Op
from mmpeft.sites.streams import Sublayer

UNREAD = "nothing that the model returns depends on it"
"""Why what ran is no site."""


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
        if parameter is not None and is_stacked(op):
            return int(parameter.shape[-1 if op.weight.transposed else -2])
        other = parameter is None or op.weight.derived or parameter.dim() != len(op.weight.shape)
        if parameter is None or other or op.name == "convolution":
            return width(op)
        return int(parameter.shape[1 if op.weight.transposed else 0])

    def first(self, op: Op) -> int:
        """The row of its parameter, or of its matrix in a stack, at which what a product reads begins."""
        assert op.weight is not None
        if self.rows(op) == width(op):
            return 0
        tensor = self.owner(op)._parameters[op.weight.name.rpartition(".")[2]] if is_stacked(op) else None
        return first_row(op, None if tensor is None else tuple(tensor.shape))

    def assign(self, op: Op, role: str, used: list[int] | None = None) -> None:
        """Give a product (or some of its channels) a role; the first role of a row stays."""
        assert op.weight is not None
        own = self.roles.setdefault(op.weight.name, {})
        first = self.first(op)
        wanted = {first + i for i in (range(width(op)) if used is None else used)}
        left = wanted - set().union(*(taken for _, taken in own.values()))
        if left:
            key = (role, min(left) if role == "proj" else 0)  # what nothing is known of stays as it is read
            own[key] = (op, left | own[key][1] if key in own else left)

    def rest(self, op: Op) -> set[int]:
        """Rows that a product reads and that have no role yet."""
        assert op.weight is not None
        first = self.first(op)
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


def first_row(op: Op, stack: tuple[int, ...] | None = None) -> int:
    """Of a product by a part of a parameter, or of a matrix in a `stack` of that shape, the row at which it begins."""
    assert op.weight is not None
    if stack is not None:
        within = op.weight.offset % prod(stack[-2:])
        return within % stack[-1] if op.weight.transposed else within // stack[-1]
    columns = op.weight.shape[-1 if op.weight.left or op.name in ("linear", "convolution") else 0]
    return op.weight.offset // max(1, columns)


def channels_of(shape: tuple[int, ...], size: int, convolution: bool) -> tuple[int, int]:
    """(how many channels, in which dimension) of a result, from the width of the product that made it."""
    last = len(shape) - 1
    order = (1, last) if convolution and len(shape) > 2 else (last, 1)
    for dim in order:
        if dim <= last and shape[dim] == size:
            return size, dim if dim != last else -1
    dim = order[0]
    return (shape[dim] if shape else size), dim if dim != last else -1
