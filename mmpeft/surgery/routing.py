"""Which tuning each row of a batch uses, and how hosts carry it out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mmpeft.errors import ConfigError
from mmpeft.hosting.batch_rows import folds
from mmpeft.hosting.recompute import is_cache
from mmpeft.hosting.running import Planned
from mmpeft.parts.base import Part
from mmpeft.surgery.row_proof import Proof, Run, check_apart, proof_key, prove
from mmpeft.surgery.together import Entry
from mmpeft.types import Args, Kwargs, Leaf, Output

if TYPE_CHECKING:
    from mmpeft.surgery.state import State


def row_groups(route: Iterable[Entry]) -> dict[Entry, list[int]]:
    """Row numbers of each entry, in order of first appearance."""
    groups: dict[Entry, list[int]] = {}
    for row, name in enumerate(route):
        groups.setdefault(name, []).append(row)
    return groups


class RowPart(Part):
    """Runs a part on some rows of the batch only."""

    def __init__(self, part: Part, rows: list[int], batch: int) -> None:
        super().__init__()
        self._part = (part,)  # a tuple: the part stays registered under its own host only
        self.rows, self.batch = rows, batch

    def _index(self, x: Tensor) -> Tensor:
        fold = folds(x, self.batch)
        rows = torch.tensor(self.rows, device=x.device)
        return rows if fold == 1 else (rows[:, None] * fold + torch.arange(fold, device=x.device)).flatten()

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        index = self._index(x)
        return x.index_copy(0, index, self._part[0].enter(host, x[index]))

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        index = self._index(y)
        return y.index_copy(0, index, self._part[0].exit(host, x[index], y[index]))


class Rows:
    """At the root, decides how a route for each row is carried out: in place where rows are proven to stay apart.

    Where they do not, or parts change what no single pass can hold (prompts of another length, trained norms), the
    model runs once for each distinct entry and the rows are put back in order. An output that mixes the rows of a
    batch (logits of every image with every text) has no value then and is None; scalars are means over rows.
    """

    def __init__(self, state: State, route: Sequence[Entry], tuned: Sequence[int], in_place: bool) -> None:
        self.state, self.route, self.tuned, self.in_place = state, tuple(route), tuned, in_place

    def __call__(self, planned: Planned, run: Run, args: Args, kwargs: Kwargs) -> Output:
        proof = self.proof(run, args, kwargs)
        if self.in_place and proof.in_place:
            return run(planned, args, kwargs)
        check_apart(proof)
        if any(is_cache(value) for value in (*args, *kwargs.values())):
            raise ConfigError(
                "the rows in use() need passes of their own, which cannot write into one key-value cache: generate for "
                "one name at a time, or pass use_cache=False"
            )
        return self.grouped(proof, run, args, kwargs)

    def proof(self, run: Run, args: Args, kwargs: Kwargs) -> Proof:
        """What is known of batches of this kind; found once, by a few passes without gradients."""
        key = (self.tuned, *proof_key(len(self.route), args, kwargs))
        if key not in self.state.proofs:
            self.state.proofs[key] = prove(self.state, len(self.route), self.tuned, run, args, kwargs)
        return self.state.proofs[key]

    def grouped(self, proof: Proof, run: Run, args: Args, kwargs: Kwargs) -> Output:
        """The passes of all groups, as one output."""
        batch, groups = len(self.route), row_groups(self.route)
        outputs = []
        for name, rows in groups.items():

            def take(value: Leaf, rows: list[int] = rows) -> Leaf:
                own = isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
                return value[rows] if own else value

            outputs.append(run(self.state.plan(name), tree_map(take, args), tree_map(take, kwargs)))
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        sizes = [len(rows) for rows in groups.values()]
        leaves = [tree_flatten(output) for output in outputs]
        joined: list[object] = []
        number = 0
        for values in zip(*(own for own, _ in leaves)):
            if not isinstance(values[0], Tensor):
                joined.append(None if is_cache(values[0]) else values[0])
                continue
            dimensions = values[0].dim() > 0
            joined.append(_joined(values, sizes, order, mixed=dimensions and number in proof.mixed))
            number += dimensions
        return tree_unflatten(joined, leaves[0][1])


def _joined(values: Sequence[Tensor], sizes: Sequence[int], order: Tensor, mixed: bool) -> Tensor | None:
    """What groups of these sizes gave, as one: rows in order, the mean over rows of a scalar, or None."""
    first = values[0]
    if all(value.shape == first.shape and torch.equal(value, first) for value in values[1:]) and not first.dim():
        return first
    if not first.dim():
        if not first.is_floating_point():
            return None
        return torch.stack([value * size for value, size in zip(values, sizes)]).sum(0) / sum(sizes)
    same = len({value.shape[1:] for value in values}) == 1
    if mixed or not same or [len(value) for value in values] != list(sizes):
        return None
    return torch.cat(list(values))[order.to(first.device)]
