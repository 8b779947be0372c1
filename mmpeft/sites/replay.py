"""Which channels of a projection reach a result: what lies between is run again on random numbers.

Any reshape, split, rotation, norm or interleaving of heads is followed without knowing it: a channel is used if the
result is no number where the channel is none. What another product makes of it counts as that product's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from random import Random

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mmpeft.functional.rows import Rows
from mmpeft.sites.graph import Graph
from mmpeft.sites.record import PRODUCTS, SOFTMAX, Op
from mmpeft.types import Args, Leaf

_PLACE = ("device", "dtype", "layout", "pin_memory")
STATISTICS = frozenset({"mean", "linalg_vector_norm", "norm", "var", "var_mean", "std", "std_mean", "max", "amax"})
STATISTICS |= {"_adaptive_avg_pool2d"}
"""What norms divide by, and gates of whole channels are made of."""
FAILED = (RuntimeError, IndexError, ValueError)
"""What operations raise that run on no other numbers: shapes and indices that follow from data."""


def channels(graph: Graph, source: Op, target: tuple[int, int], without: frozenset[str] = frozenset()) -> list[int]:
    """Output channels of a product that go into a tensor, named by the operation that made it and its identity.

    Ways through operations named in `without` do not count.
    """
    between = graph.between(source.index, target[0])
    which = graph.which(target)
    key = (without, source.shape, source.name, source.channel, which, *_form(graph, source, between))
    if key not in graph.replayed:
        graph.replayed[key] = _replay(graph, source, target, [op for op in between if op.name not in without])
    return graph.replayed[key]


def _form(graph: Graph, source: Op, between: list[Op]) -> list[Hashable]:
    """What lies between without its numbers: the blocks of a model have it in common."""
    place = {op.index: i for i, op in enumerate([source, *between])}
    found: list[Hashable] = []
    for op in between:
        inputs = [(place.get(i, graph.ops[i].shape), graph.which(pair)) for pair in graph.read(op) for i in pair[:1]]
        plain = tree_map(lambda v: v.__class__ if isinstance(v, Tensor) else v, (op.args, op.kwargs))
        found.append((op.name, op.shape, tuple(inputs), repr(plain)))
    return found


def _replay(graph: Graph, source: Op, target: tuple[int, int], between: list[Op]) -> list[int]:
    total = source.shape[source.channel]
    own, fed = [], {source.index}
    for op in between:
        passes = op.name not in PRODUCTS or op.index == target[0] or is_grouped(op)
        if passes and not fed.isdisjoint(graph.activations(op)):
            own.append(op)
            fed.add(op.index)
    if target[0] not in fed or any(op.func is None for op in own):
        return list(range(total))

    def reach(first: int, last: int) -> bool:
        """Whether any of the channels `first <= c < last` goes into the result: no number becomes none there."""
        return bool(_again(graph, source, target, own, source.channel, slice(first, last), held=held).any())

    held: dict[int, Tensor] | None = None if any(op.func and op.func._schema.is_mutable for op in own) else {}
    try:
        return _used(total, reach)
    except FAILED:
        return list(range(total))


def is_grouped(op: Op) -> bool:
    """Whether a product is a convolution in groups of channels, of which the channels keep their order."""
    return op.name == "convolution" and len(op.args) > 8 and int(op.args[8]) > 1


def spread(graph: Graph, source: Op, target: tuple[int, int], dim: int, at: int) -> Tensor | None:
    """Where in a result those entries of another arrive that have the index `at` in the dimension `dim`, as booleans.

    Means and norms over positions are taken for numbers that do not depend on them. None where that cannot be run.
    """
    between = graph.between(source.index, target[0])
    key = ("spread", dim, at, source.shape, source.name, graph.which(target), *_form(graph, source, between))
    if key not in graph.spreads:
        runs = all(op.func is not None and op.name not in ("embedding", "_grouped_mm") for op in between)
        try:
            found = _again(graph, source, target, between, dim, slice(at, at + 1), STATISTICS) if runs else None
        except FAILED:
            found = None
        graph.spreads[key] = found
    return graph.spreads[key]


def over_positions(graph: Graph, source: Op, target: tuple[int, int], dim: int) -> bool | None:
    """Whether a dimension of a result is that of the positions of a product, by where its last position arrives."""
    own = position_dim(source)
    mask = spread(graph, source, target, own, source.shape[own] - 1)
    if mask is None or not mask.any():
        return None
    other = -3 - dim  # of the last two
    return share(mask, dim) < share(mask, other)


def position_dim(op: Op) -> int:
    """A dimension of a product's result along which positions lie."""
    return -2 if op.channel == -1 else -1


def share(mask: Tensor, dim: int) -> float:
    """Of the indices in a dimension, how many have an entry that is true."""
    return float(mask.movedim(dim, 0).flatten(1).any(1).float().mean())


def _only_weighs(op: Op, arguments: Args) -> bool:
    """Whether an operation mixes positions and leaves each its own: a softmax, a norm, a convolution of channels."""
    if op.name == "convolution":
        return is_grouped(op) and arguments[0].shape == op.shape
    return op.name in SOFTMAX or op.name == "native_group_norm"


@torch.inference_mode(False)
@torch.no_grad()
def _again(
    graph: Graph,
    source: Op,
    target: tuple[int, int],
    between: list[Op],
    dim: int,
    lost: slice,
    still: frozenset[str] = frozenset(),
    held: dict[int, Tensor] | None = None,
) -> Tensor:
    """Which entries of a result are no number where some of another's are none; what is `still` never is.

    `held` keeps what does not depend on them from one run to the next, where no operation changes it.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(source.shape, generator=generator) + 0.5
    start.movedim(dim, 0)[lost] = float("nan")
    values = {**(held or {}), source.outs[0]: start}

    def real(value: Leaf) -> Leaf:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in values:
            constant, base = getattr(value, "constant", None), value._base
            if constant is not None:  # an index that the model wrote down keeps its value
                values[id(value)] = constant
            elif base is not None and base.is_contiguous() and base.dtype == value.dtype:  # what is put into it shows
                values[id(value)] = real(base).as_strided(value.shape, value.stride(), value.storage_offset())
            else:
                values[id(value)] = _random(value, generator)
            if held is not None:
                held[id(value)] = values[id(value)]
        return values[id(value)]

    for op in between:
        assert op.func is not None
        kwargs = {key: value for key, value in op.kwargs.items() if key not in _PLACE}
        arguments, kwargs = tree_map(real, (op.args, kwargs))
        made = [o for o in tree_leaves(op.func(*arguments, **kwargs)) if isinstance(o, Tensor)]
        if op.name in still:
            made = [o.nan_to_num(1.0) for o in made]
        elif still and _only_weighs(op, arguments):
            made[0] = torch.empty_like(made[0]).copy_(arguments[0])
        values.update(zip(op.outs, made))
    return values[target[1]].isnan()


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
