"""Which channels of a projection reach a result: what lies between is run again on random numbers.

Any reshape, split, rotation, norm or interleaving of heads is followed without knowing it: a channel is used if the
result is no number where the channel is none.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
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
@torch.no_grad()
def _replay(graph: Graph, source: Op, target: tuple[int, int], between: list[Op]) -> list[int]:
    total = source.shape[source.channel]
    if any(op.func is None or (op.name in PRODUCTS | SOFTMAX and op.index != target[0]) for op in between):
        return list(range(total))

    def reach(first: int, last: int) -> bool:
        """Whether any of the channels `first <= c < last` goes into the result: no number becomes none there."""
        generator = torch.Generator().manual_seed(0)
        start = torch.rand(source.shape, generator=generator) + 0.5
        start.movedim(source.channel, -1)[..., first:last] = float("nan")
        values = {source.outs[0]: start}

        def real(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in values:
                constant = getattr(value, "constant", None)  # an index that the model wrote down keeps its value
                values[id(value)] = _random(value, generator) if constant is None else constant
            return values[id(value)]

        for op in between:
            kwargs = {key: value for key, value in op.kwargs.items() if key not in _PLACE}
            arguments, kwargs = tree_map(real, (op.args, kwargs))
            made = [o for o in tree_leaves(op.func(*arguments, **kwargs)) if isinstance(o, Tensor)]
            values.update(zip(op.outs, made))
        return bool(values[target[1]].isnan().any())

    return _used(total, reach)


def _used(total: int, reach: Callable[[int, int], bool]) -> list[int]:
    """The channels that reach a result, by few questions: runs that come again are checked at random places.

    No gradient is asked for: a process that has run a backward pass cannot fork others that do.
    """
    if total <= 64:
        return [c for c in range(total) if reach(c, c + 1)]
    if not reach(0, total):
        return []
    start = _least(0, total, lambda end: reach(0, end)) - 1
    stop = _least(start, total, lambda end: not _is_used(start, end, reach)) - 1
    if _is_used(start, total, reach):
        stop = total
    used = range(start, stop)
    again = _least(stop, total, lambda end: reach(stop, end)) - 1 if stop < total and reach(stop, total) else total
    period = again - start
    found = set(used)
    if again < total:
        found = {c for first in range(start, total, period) for c in range(first, min(total, first + stop - start))}
    draw = Random(0)
    asked = {0, total - 1, start, stop - 1, *(draw.randrange(total) for _ in range(24))}
    if all(reach(c, c + 1) == (c in found) for c in asked):
        return sorted(found)
    return [c for c in range(total) if reach(c, c + 1)]


def _least(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The least number above `low` for which something holds that holds for all from there on."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _is_used(first: int, last: int, reach: Callable[[int, int], bool]) -> bool:
    """Whether all of some channels are used, by the ends and some between."""
    draw = Random(last)
    asked = {first, last - 1, *(draw.randrange(first, last) for _ in range(5))}
    return all(reach(c, c + 1) for c in asked)


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
