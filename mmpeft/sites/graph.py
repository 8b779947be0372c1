"""What can be asked of a recorded pass: what lies behind a result, what reads it, which module it belongs to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import cached_property, reduce
from operator import or_

from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmpeft.sites.record import PRODUCTS, SOFTMAX, VIEWS, Call, Op, Record

JOINTS = frozenset({"bmm", "mm", "baddbmm"})
"""Products that may be of two activations."""


class Graph:
    """A recorded pass; operations are named by their index."""

    def __init__(self, record: Record, dropouts: frozenset[str] = frozenset()) -> None:
        self.record = record
        self.dropouts = dropouts
        """Paths of dropout layers."""
        self.ops: list[Op] = record.ops
        self.calls: list[Call] = record.calls
        self.replayed: dict[Hashable, list[int]] = {}
        """Channels that were found by replay, by what lies between."""
        self.spreads: dict[Hashable, Tensor | None] = {}
        """The same of where some entries arrive."""
        self.inputs = [op for op in self.ops if op.name == "input"]
        self._above: list[int] = []
        for op in self.ops:
            above = 0
            for i in self.activations(op):
                above |= self._above[i] | 1 << i
            self._above.append(above)

    def activations(self, op: Op) -> list[int]:
        """What an operation reads, a product's own weight and bias left out."""
        if op.weight is None:
            return op.inputs
        moving = [i for i in op.inputs if not self.ops[i].static and i != op.held]
        return moving or self._static_operand(op)

    def _static_operand(self, op: Op) -> list[int]:
        """Of a product of constants by a weight: the constants."""
        wide = [i for i in op.inputs if len(self.ops[i].shape) > 1]
        return wide[:1] if len(wide) > 1 and op.name != "embedding" else []

    @cached_property
    def users(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for op in self.ops:
            for i in self.activations(op):
                found[i].append(op.index)
        return found

    @cached_property
    def products(self) -> list[Op]:
        """Every product by a weight."""
        return [op for op in self.ops if op.weight is not None]

    @cached_property
    def product_bits(self) -> int:
        """The same, as bits."""
        return sum(1 << op.index for op in self.products)

    def is_above(self, ancestor: int, op: int) -> bool:
        """Whether a result goes into another."""
        return ancestor == op or bool(self._above[op] >> ancestor & 1)

    def above(self, op: int) -> int:
        """Everything that goes into a result, as bits; the result too."""
        return self._above[op] | 1 << op

    def between(self, start: int, end: int) -> list[Op]:
        """Operations on a way from one result to another, the end included."""
        above = self.above(end)
        return [self.ops[i] for i in range(start + 1, end + 1) if above >> i & 1 and self._above[i] >> start & 1]

    def read(self, op: Op) -> list[tuple[int, int]]:
        """(operation, identity) of each tensor that an operation reads: one operation may make several."""
        return [(i, id(t)) for i, t in zip(op.inputs, _tensors(op))]

    def shapes(self, op: Op) -> list[tuple[int, tuple[int, ...]]]:
        """(operation, shape) of each tensor that an operation reads."""
        return [(i, tuple(t.shape)) for i, t in zip(op.inputs, _tensors(op))]

    def which(self, tensor: tuple[int, int]) -> int:
        """Which of the results of an operation a tensor is; -1 for one that it changed in place through a view."""
        outs = self.ops[tensor[0]].outs
        return outs.index(tensor[1]) if tensor[1] in outs else -1

    def root(self, op: int) -> int:
        """The result of which this one is another view; of the same slice taken twice the first."""
        while self.ops[op].name in VIEWS and self.ops[op].inputs:
            op = self.ops[op].inputs[0]
        return self._slices.get(op, op)

    @cached_property
    def _slices(self) -> dict[int, int]:
        """Of each slice, the first one of the same result."""
        first: dict[Hashable, int] = {}
        found: dict[int, int] = {}
        for op in self.ops:
            if op.name in ("slice", "select"):
                made = self.read(op)[0]
                key = (op.name, found.get(made[0], made[0]), self.which(made), op.args[1:])
                found[op.index] = first.setdefault(key, op.index)
        return found

    @cached_property
    def returned(self) -> int:
        """The operations that what the model returns depends on, as bits."""
        return reduce(or_, (self.above(i) for i in self.record.outputs), 0)

    def behind(self, start: int) -> list[Op]:
        """The nearest weight products that a result comes from, not past other products or a softmax."""
        return self._nearest([start], lambda i: self.ops[i].inputs, frozenset())

    def mixes_behind(self, start: int) -> bool:
        """Whether products of activations, or a softmax, are among the nearest products that a result comes from."""
        todo, seen = [start], set()
        while todo:
            op = self.ops[todo.pop()]
            if op.index in seen or op.weight is not None:
                continue
            seen.add(op.index)
            if op.name in PRODUCTS | SOFTMAX and not op.static:
                return True
            todo += op.inputs
        return False

    def ahead(self, start: int, until: frozenset[int] = frozenset()) -> list[Op]:
        """The nearest weight products that a result goes into, not past others, nor into the results `until`."""
        return self._nearest(self.users[start], lambda i: self.users[i], until)

    def _nearest(self, start: list[int], onward: Callable[[int], list[int]], until: frozenset[int]) -> list[Op]:
        todo, seen, found = list(start), set(until), []
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            op = self.ops[i]
            if op.weight is not None:
                found.append(op)
            elif op.name not in PRODUCTS | SOFTMAX:
                todo += onward(i)
        return sorted(found, key=lambda op: op.index)

    # -- modules --------------------------------------------------------------------------------------------

    def around(self, op: int) -> Iterator[Call]:
        """The module calls around an operation, innermost first."""
        index = self.ops[op].call
        while index >= 0:
            call = self.calls[index]
            yield call
            index = call.parent

    def holding(self, ops: Iterable[int]) -> Iterator[Call]:
        """The module calls around all of some operations, innermost first."""
        wanted = list(ops)
        first, last = min(wanted), max(wanted)
        return (call for call in self.around(wanted[0]) if call.first <= first and last < call.last)

    @cached_property
    def _runs(self) -> Counter[tuple[str, int]]:
        return Counter((call.path, call.parent) for call in self.calls)

    def runs_once(self, call: Call) -> bool:
        """Whether a module runs no second time within the run of the module around it."""
        return self._runs[call.path, call.parent] == 1

    def path(self, op: Op) -> str:
        """The innermost module that was running."""
        return self.calls[op.call].path


def _tensors(op: Op) -> list[Tensor]:
    return [a for a in tree_leaves((op.args, op.kwargs)) if isinstance(a, Tensor)]
