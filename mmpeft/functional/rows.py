"""The output rows that one site owns in a fused projection."""

from __future__ import annotations

from torch import Tensor

Rows = tuple[int, int] | tuple[int, int, int]
"""`(start, stop)`, or `(start, stop, period)`: the same slice of every period, as where heads are interleaved."""


def count_rows(rows: Rows | None, total: int) -> int:
    """How many of `total` rows are owned; all of them for None."""
    if rows is None:
        return total
    repeats = total // rows[2] if len(rows) == 3 else 1
    return (rows[1] - rows[0]) * repeats


def turned(weight: Tensor) -> Tensor:
    """A weight stored [in, out, ...] as [out, in, ...], or back."""
    return weight.t() if weight.dim() == 2 else weight.transpose(0, 1)


def take_rows(tensor: Tensor, rows: Rows | None, dim: int = 0) -> Tensor:
    """The owned slice of `tensor` along `dim`; a view where the rows are contiguous."""
    if rows is None:
        return tensor
    start, stop = rows[:2]
    if len(rows) == 2:
        return tensor.narrow(dim, start, stop - start)
    dim %= tensor.dim()
    periods: Tensor = tensor.unflatten(dim, (-1, rows[2]))
    return periods.narrow(dim + 1, start, stop - start).flatten(dim, dim + 1)


def put_rows(tensor: Tensor, value: Tensor, rows: Rows | None, dim: int = 0) -> Tensor:
    """`tensor` with the owned slice along `dim` replaced by `value`; a new tensor, `value` itself when it is all."""
    if rows is None or value.shape[dim] == tensor.shape[dim]:
        return value
    start, stop = rows[:2]
    if len(rows) == 2:
        return tensor.slice_scatter(value, dim, start, stop)
    dim %= tensor.dim()
    periods: Tensor = tensor.unflatten(dim, (-1, rows[2]))
    own = value.unflatten(dim, (-1, stop - start))
    return periods.slice_scatter(own, dim + 1, start, stop).flatten(dim, dim + 1)


def cut_rows(rows: tuple[int, int], start: int, stop: int) -> tuple[tuple[int, int], slice] | None:
    """Of contiguous rows those in `start:stop`: where they lie in that piece, and which they are; None for none."""
    first, last = max(rows[0], start), min(rows[1], stop)
    return ((first - start, last - start), slice(first - rows[0], last - rows[0])) if first < last else None
