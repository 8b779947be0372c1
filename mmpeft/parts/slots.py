"""Rows of a batch under many low-rank updates: one product of the base, and one of each row's own factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.functional.fused import Update
from mmpeft.hosting.batch_rows import folds
from mmpeft.hosting.forward import planned_of
from mmpeft.hosting.host import original_class
from mmpeft.hosting.unchanged import made_of
from mmpeft.parts.base import Part, cast
from mmpeft.parts.delta import Delta
from mmpeft.parts.factors import LowRank
from mmpeft.parts.product import WeightProduct
from mmpeft.types import Attribute

Span = tuple[int, int]
Factors = tuple[Span, Tensor, Tensor, Tensor | float, Tensor | None]


ENTRIES = 8
"""Of each tensor, looked at for writes through `.data`, which no count of changes sees."""


class _Pattern:
    """The factors of the rows of one batch, and what they were made of: all of it is asked for in every call."""

    def __init__(self, key: object, tensors: Sequence[Tensor]) -> None:
        self.key, self.marks = key, _marks(tensors)
        flat = [tensor.detach().reshape(-1) for tensor in tensors]
        self.entries = [own[:: max(1, len(own) // ENTRIES)] for own in flat]
        self.values = torch.cat(self.entries)
        self.factors: list[Factors] = []

    def serves(self, key: object, tensors: Sequence[Tensor]) -> bool:
        """Whether the same rows ask, and the tensors are where and what they were."""
        same = self.key == key and self.marks == _marks(tensors)
        return same and torch.equal(torch.cat(self.entries), self.values)


def _marks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def slotted(part: Part) -> bool:
    """Whether a part can share a product with those of other tunings: a low-rank update of a linear's own call."""
    return isinstance(part, Delta) and isinstance(part.factor, LowRank) and not part.lookup


class Slots:
    """`y[b] = g_b ⊙ (W x[b] + s_b B_b A_b x[b]) + b` for rows b under different tunings of one linear.

    Factors of all tunings stand in slots, and a row takes those of its own: a plan serves every pattern of names, and
    rows of no name have zeros. Ranks that differ are filled up with zeros. Without gradients the factors of the last
    pattern are kept while nothing changes (S-LoRA's batching, arXiv:2311.03285, without its kernels).
    """

    def __init__(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        self.deltas = {name: tuple(own) for name, own in deltas.items()}
        self._places = {name: [place for delta in own for place in _places(delta)] for name, own in self.deltas.items()}
        self._gained = {name for name, own in self.deltas.items() if any(d.magnitude is not None for d in own)}
        self._dropped = {name for name, own in self.deltas.items() if any(d.dropout for d in own)}
        self._last: _Pattern | None = None  # replaced as a whole: threads share it

    def __call__(self, host: nn.Module, x: Tensor) -> Tensor:
        planned = planned_of(host)
        names: Sequence[str | None] = planned.route  # type: ignore[assignment]  # names of rows here
        rows = len(names)
        folds(x, rows)
        one_graph = torch.compiler.is_compiling() and not torch.is_grad_enabled()  # it must not ask for names
        present = list(self.deltas) if one_graph else [n for n in dict.fromkeys(names) if n in self.deltas]
        first = next(iter(self.deltas.values()))[0]
        reading = first.reading(host)
        if self._dropped and any(d.dropping for n in self._dropped.intersection(present) for d in self.deltas[n]):
            return self._one_by_one(host, reading, x, names)
        found = self._factors(host, names, present, x.dtype)
        gained = any(gain is not None for *_, gain in found)
        y = _base(host, x)
        if reading.bias is not None and gained:
            y = y - cast(reading.bias, y.dtype)
        source = x.reshape(rows, -1, x.shape[-1])
        out = y.reshape(rows, -1, y.shape[-1])
        for (start, stop), down, up, scale, gain in found:
            # the skinny product with its r rows on the left is the faster one, but for a single token
            inner = torch.bmm(source, down.mT) if source.shape[1] == 1 else torch.bmm(down, source.mT).mT
            if isinstance(scale, Tensor):
                inner, alpha = inner * scale[:, None, None], 1.0
            else:
                alpha = scale
            whole = stop - start == out.shape[-1]
            own = out if whole else out[..., start:stop]
            if not torch.is_grad_enabled() and gain is None and not torch.compiler.is_compiling():
                own.baddbmm_(inner, up.mT, alpha=alpha)  # the output of the base is nobody else's
                continue
            own = torch.baddbmm(own, inner, up.mT, alpha=alpha)
            if gain is not None:
                own = own * cast(gain, own.dtype)[:, None]
            out = own if whole else out.slice_scatter(own, -1, start, stop)
        y = out.reshape(y.shape)
        return y + cast(reading.bias, y.dtype) if reading.bias is not None and gained else y

    def _factors(
        self, host: nn.Module, names: Sequence[str | None], present: Sequence[str], dtype: torch.dtype
    ) -> list[Factors]:
        """For each range of output rows: `A` [B, r, i], `B` [B, n, r], scales [B] and gains [B, n] of its rows."""
        if torch.is_grad_enabled():
            return self._stacked(host, present, names, dtype)
        if torch.compiler.is_compiling():  # all slots, so that one graph serves every pattern
            planned = planned_of(host)
            assert planned.slots is not None
            return self._stacked(host, list(planned.state.placements), planned.slots, dtype)
        tensors: list[Attribute] = [table[key] for name in present for table, key in self._places[name]]
        if any(name in self._gained for name in present):
            stored = self.deltas[present[0]][0].reading(host).stored
            tensors += [plain for tensor in stored for plain in made_of(tensor)]
        last = self._last
        if last is None or not last.serves((names, dtype), tensors):
            made = _Pattern((names, dtype), tensors)  # before stacking: a change meanwhile is seen
            made.factors = self._stacked(host, present, names, dtype)
            last = self._last = made
        return last.factors

    def _stacked(
        self, host: nn.Module, slots: Sequence[str], rows: Tensor | Sequence[str | None], dtype: torch.dtype
    ) -> list[Factors]:
        updates: dict[tuple[Span, int], dict[str, Update]] = {}
        reading: WeightProduct | None = None
        for name in slots:
            seen: dict[Span, int] = {}  # rows of interleaved heads are given as all rows, once for each of q, k and v
            for delta in self.deltas.get(name, ()):
                update = _plain(delta)
                if update is None:
                    reading = reading or delta.reading(host)
                    update = delta.update(reading)
                assert update is not None
                span = (update.start, update.stop)
                seen[span] = seen.get(span, 0) + 1
                updates.setdefault((span, seen[span]), {})[name] = update
        return [(span, *_gathered(own, slots, rows, dtype)) for (span, _), own in updates.items()]

    def _one_by_one(self, host: nn.Module, reading: WeightProduct, x: Tensor, names: Sequence[str | None]) -> Tensor:
        """Where the input of an update is dropped, each tuning for itself."""
        y, fold = _base(host, x), folds(x, len(names))
        for name, deltas in self.deltas.items():
            rows = [i for i, own in enumerate(names) if own == name]
            if not rows:
                continue
            folded = torch.tensor(rows, device=x.device)[:, None] * fold
            index = (folded + torch.arange(fold, device=x.device)).flatten()
            own = y[index]
            for delta in deltas:
                own = delta.exit(host, x[index], own)
            y = y.index_copy(0, index, own)
        return y


def _plain(delta: Delta) -> Update | None:
    """The update of a delta of one range of rows with nothing to compute first; None for any other."""
    if delta.magnitude is not None or type(delta.factor) is not LowRank or len(delta.rows or (0, 0)) != 2:
        return None
    down, up = delta.factor._parameters["A"], delta.factor._parameters["B"]
    assert down is not None
    assert up is not None
    start, stop = (delta.rows or (0, len(up)))[:2]
    return Update(start, stop, delta.scale, down, up)


def _gathered(
    own: Mapping[str, Update], slots: Sequence[str], rows: Tensor | Sequence[str | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | float, Tensor | None]:
    """The factors of one range of output rows for each row of the batch, by its name or by its slot, 0 being empty."""
    some = next(iter(own.values()))
    rank = max(len(update.down) for update in own.values())
    empty = some.down.new_zeros(rank, some.down.shape[1]), some.up.new_zeros(len(some.up), rank)
    none = Update(some.start, some.stop, some.scale, *empty)
    names = [None, *slots] if isinstance(rows, Tensor) else rows
    held = [none if name is None else own.get(name, none) for name in names]
    down = torch.stack([cast(_filled(u.down, rank, 0), dtype) for u in held])
    up = torch.stack([cast(_filled(u.up, rank, 1), dtype) for u in held])
    scale: Tensor | float = some.scale
    if any(u.scale != some.scale for u in held):
        scale = torch.tensor([u.scale for u in held], dtype=dtype, device=down.device)
    gain = None
    if any(update.gain is not None for update in own.values()):
        ones = some.up.new_ones(len(some.up))
        gain = torch.stack([ones if u.gain is None else u.gain.to(ones.dtype) for u in held])
    if not isinstance(rows, Tensor):
        return down, up, scale, gain
    rows = rows.to(down.device)
    scale = scale[rows] if isinstance(scale, Tensor) else scale
    return down[rows], up[rows], scale, None if gain is None else gain[rows]


def _filled(tensor: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - tensor.shape[dim]
    return F.pad(tensor, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else tensor


def _places(module: nn.Module) -> list[tuple[dict[str, nn.Parameter | None], str]]:
    """Where a module and those in it keep their parameters: asking for them goes over all modules each time."""
    return [(own._parameters, name) for own in module.modules() for name, p in own._parameters.items() if p is not None]


def _base(host: nn.Module, x: Tensor) -> Tensor:
    own = original_class(host)
    y: Tensor = own.forward(host, x)
    return y
