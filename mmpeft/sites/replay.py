"""Which channels of a projection reach a result: what lies between is run again on random numbers.

Any reshape, split, rotation, norm or interleaving of heads is followed without knowing it: a channel is used if the
result has a gradient in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mmpeft.functional.rows import Rows
from mmpeft.sites.graph import Graph
from mmpeft.sites.record import PRODUCTS, SOFTMAX, Op

_PLACE = ("device", "dtype", "layout", "pin_memory")


def channels(graph: Graph, source: Op, target: tuple[int, int]) -> list[int]:
    """Output channels of a product that go into a tensor, named by the operation that made it and its identity."""
    between = graph.between(source.index, target[0])
    which = graph.which(target)
    key = (source.shape, source.name, source.channel, which, *_form(graph, source, between))
    if key not in graph.replayed:
        graph.replayed[key] = _replay(graph, source, target, between)
    return graph.replayed[key]


def _form(graph: Graph, source: Op, between: list[Op]) -> list[Any]:
    """What lies between without its numbers: the blocks of a model have it in common."""
    place = {op.index: i for i, op in enumerate([source, *between])}
    found: list[Any] = []
    for op in between:
        inputs = [(place.get(i, graph.ops[i].shape), graph.which(pair)) for pair in graph.read(op) for i in pair[:1]]
        plain = tree_map(lambda v: v.__class__ if isinstance(v, Tensor) else v, (op.args, op.kwargs))
        found.append((op.name, op.shape, tuple(inputs), repr(plain)))
    return found


@torch.inference_mode(False)
@torch.enable_grad()
def _replay(graph: Graph, source: Op, target: tuple[int, int], between: list[Op]) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    values: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in values:
            constant = getattr(value, "constant", None)  # an index that the model wrote down keeps its value
            values[id(value)] = _random(value, generator) if constant is None else constant
        return values[id(value)]

    start = (torch.rand(source.shape, generator=generator) + 0.5).requires_grad_()
    with torch.enable_grad():
        values[source.outs[0]] = begun = start.clone()  # which may be changed in place
    for op in between:
        if op.func is None or (op.name in PRODUCTS | SOFTMAX and op.index != target[0]):
            return list(range(source.shape[source.channel]))
        kwargs = {key: value for key, value in op.kwargs.items() if key not in _PLACE}
        arguments, kwargs = tree_map(real, (op.args, kwargs))
        made = [o for o in tree_leaves(op.func(*arguments, **kwargs)) if isinstance(o, Tensor)]
        for key, value in zip(op.outs, made):
            values[key] = value
    result = values[target[1]] if between else begun
    if not result.requires_grad:
        return []
    weights = torch.rand(result.shape, generator=generator)
    (gradient,) = torch.autograd.grad(result, start, weights)
    used = gradient.movedim(source.channel, -1).flatten(0, -2).abs().sum(0) > 0
    return used.nonzero().flatten().tolist()


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    shape = tuple(value.shape)
    if value.is_complex():
        return torch.complex(torch.rand(shape, generator=generator), torch.rand(shape, generator=generator))
    if value.is_floating_point():
        return torch.rand(shape, generator=generator) + 0.5
    return torch.zeros(shape, dtype=value.dtype)


def as_rows(used: list[int], total: int) -> Rows | None:
    """Channels as a slice `(start, stop)`, or `(start, stop, period)` where it comes again; None for all of them.

    Raises:
        ValueError: they are neither.
    """
    if not used or len(used) == total:
        return None
    start = used[0]
    run = next((i for i in range(1, len(used)) if used[i] != used[i - 1] + 1), len(used))
    if run == len(used):
        return (start, start + run)
    period = used[run] - start
    found: Rows = (start, start + run, period)
    expected = [i for first in range(start, total, period) for i in range(first, first + run)]
    if expected != used or total % period:
        raise ValueError(f"channels {used[:8]}… of {total} follow no period")
    return found
