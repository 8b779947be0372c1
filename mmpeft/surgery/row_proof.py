"""Whether the rows of a batch stay apart on their way through a model: what a route for each row relies on.

Folded windows, flattened pictures and stacked streams put something else than the batch into dimension 0. That is not
read off shapes, which may agree by chance: one row of an input is changed, and what changes with it is looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from mmpeft.errors import Refused
from mmpeft.hosting.batch_rows import row_count_error
from mmpeft.hosting.forward import HostPlan
from mmpeft.hosting.recompute import is_cache
from mmpeft.hosting.running import RUNNING, Planned
from mmpeft.parts.base import Part
from mmpeft.types import Args, Kwargs, Leaf, Output, TorchOp

if TYPE_CHECKING:
    from mmpeft.surgery.state import State

Run = Callable[[Planned, Args, Kwargs], Output]
MOVING = {"masked_scatter", "index_put", "nonzero", "masked_select"}
"""Operations that put values where other values say."""


@dataclass
class Proof:
    """What was found of one kind of batch: whether parts may act on rows in place, or groups may run one by one."""

    in_place: bool
    apart: bool
    mixed: frozenset[int] = frozenset()
    """Outputs, by their numbers, that mix the rows: logits of every picture with every text."""
    reason: str = ""


def proof_key(batch: int, args: Args, kwargs: Kwargs) -> tuple[Hashable, ...]:
    """What batches must have in common for one proof to hold for them: names, dimensions and rows, not lengths."""
    named = [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]
    facts = [
        (name, t.dim(), t.shape[0] if t.dim() else 0, t.is_floating_point())
        for name, value in named
        for t in tree_leaves(value)
        if isinstance(t, Tensor)
    ]
    return (batch, *facts, *(name for name, value in named if is_cache(value)))


def prove(state: State, batch: int, tuned: Sequence[int], run: Run, args: Args, kwargs: Kwargs) -> Proof:
    """Change the last row of each input in turn, and see which rows of the tuned hosts' inputs and of outputs change.

    Nothing is left behind: no gradient, no random number, no buffer, no entry of a key-value cache.

    Raises:
        ConfigError: no input has one row for each name.
    """
    leaves, spec = tree_flatten((args, kwargs))
    rows = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.dim() and t.shape[0] == batch]
    if not rows:
        sizes = [t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()]
        raise row_count_error(batch, sizes[0] if sizes else 0)
    if batch == 1:
        return Proof(True, True)
    with _nothing_left(state.hosts[""]), torch.no_grad():
        plain = _watched(state, tuned, run, leaves, spec)
        seen: dict[tuple[int, int], set[int]] = {}
        by_pictures: set[tuple[int, int]] = set()
        mixed: set[int] = set()
        kinds = {leaves[i].is_floating_point() for i in rows}
        foreign = [t for t in leaves if isinstance(t, Tensor) and t.dim() > 1 and t.shape[0] != batch]
        pictures = plain.moved and (len(kinds) > 1 or any(t.is_floating_point() for t in foreign))
        for i in rows:

            def watched(other: Tensor, i: int = i) -> _Seen:
                return _watched(state, tuned, run, [*leaves[:i], other, *leaves[i + 1 :]], spec)

            found = _with_another_row(leaves[i], watched)
            if found is None:
                continue
            mixed |= _mixed(plain.outputs, found.outputs, batch)
            for place, before in plain.sums.items():
                changed = _differ(before, found.sums.get(place))
                if changed is None:
                    return Proof(False, False, reason="its passes differ from one another with the values given")
                if pictures and leaves[i].is_floating_point():  # no rows: each text may have any number of them
                    by_pictures.update({place} if changed else ())
                else:
                    seen.setdefault(place, set()).update(changed)
    apart = len(mixed) < len(plain.outputs) and not pictures
    for place, before in plain.sums.items():
        changed = seen.get(place, set())
        fold, rest = divmod(len(before), batch)
        own = set(range((batch - 1) * fold, batch * fold))
        alone = changed or (fold == 1 and place not in by_pictures)  # what no input reaches is the same for every row
        if rest or not changed <= own or not alone:
            where = f"{_path(state, place[0])} sees something else than rows there"
            return Proof(False, apart, frozenset(mixed), where)
    return Proof(True, apart, frozenset(mixed))


def check_apart(proof: Proof) -> None:
    """Raise Refused where groups of rows cannot run one after the other either."""
    if not proof.apart:
        why = proof.reason or "outputs or pictures cannot be told to belong to one row"
        raise Refused(
            f"the rows of this batch do not stay apart in the model ({why}), so that each cannot have a tuning of its "
            "own in one batch: use() one name at a time"
        )


@dataclass
class _Seen:
    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By a host's seat and the number of its call: one sum for each entry of dimension 0."""
    outputs: list[Tensor] = field(default_factory=list)
    moved: bool = False


class _Watch(Part):
    """At a host: sums up each entry of dimension 0 of what comes in."""

    def __init__(self, seat: int, seen: _Seen) -> None:
        super().__init__()
        self.seat, self.seen, self.calls = seat, seen, 0

    def enter(self, host: nn.Module, x: Leaf) -> Leaf:
        if isinstance(x, Tensor) and x.dim():
            flat = x.detach().reshape(len(x), -1).double()
            weights = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype).sin()
            self.seen.sums[self.seat, self.calls] = (flat * weights).sum(1)
            self.calls += 1
        return x


class _Moving(TorchDispatchMode):
    def __init__(self, seen: _Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.seen = seen

    def __torch_dispatch__(self, func: TorchOp, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        if func.overloadpacket.__name__.rstrip("_") in MOVING:
            self.seen.moved = True
        return func(*args, **(kwargs or {}))


def _watched(state: State, tuned: Sequence[int], run: Run, leaves: list[object], spec: TreeSpec) -> _Seen:
    """One pass of the plain model."""
    seen = _Seen()
    plans = {seat: HostPlan(enter=(_Watch(seat, seen),)) for seat in tuned}
    args, kwargs = tree_unflatten([copy.deepcopy(v) if is_cache(v) else v for v in leaves], spec)
    torch.manual_seed(0)
    with _Moving(seen):
        output = run(Planned(state, None, plans), args, kwargs)
    seen.outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.dim()]
    return seen


def _with_another_row(rows: Tensor, watched: Callable[[Tensor], _Seen]) -> _Seen | None:
    """A pass with another last row, the first one that the model takes; None where every choice is the same row.

    Words change their order first, so that those which stand for pictures stay as many.
    """
    last = rows[-1]
    others: list[Tensor] = list(rows[:-1])
    if rows.is_floating_point():
        others = [last + torch.rand_like(last) * (1 + last.abs())]
    elif last.dim():
        others = [last.roll(1, -1), last.flip(-1), *others]
    others = [other for other in others if not torch.equal(other, last)]
    for other in others:
        try:
            return watched(torch.cat([rows[:-1], other[None]]))
        except (ValueError, IndexError, RuntimeError):
            if other is others[-1]:
                raise
    return None


def _differ(before: Tensor, after: Tensor | None) -> set[int] | None:
    """Entries that differ; None where they cannot be compared."""
    if after is None or after.shape != before.shape:
        return None
    same = (before == after) | (before.isnan() & after.isnan())
    return set((~same).nonzero().flatten().tolist())


def _mixed(before: list[Tensor], after: list[Tensor], batch: int) -> set[int]:
    """Outputs in which more than the last row changes, or of which dimension 0 is none of rows."""
    found = set()
    for number, (a, b) in enumerate(zip(before, after)):
        if len(a) != batch or a.shape != b.shape:
            found.add(number)
        else:
            same = ((a == b) | (a.isnan() & b.isnan())).reshape(batch, -1).all(1)
            found.update({number} if not bool(same[:-1].all()) else ())
    return found


def _path(state: State, seat: int) -> str:
    return next((path for path, host in state.hosts.items() if host._mmpeft_seat.index == seat), "a module")


@contextmanager
def _nothing_left(model: nn.Module) -> Iterator[None]:
    buffers = [(b, b.clone()) for b in model.buffers()] if model.training else []
    token = RUNNING.set(None)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        RUNNING.reset(token)
        for buffer, value in buffers:
            buffer.copy_(value)
