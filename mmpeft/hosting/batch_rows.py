"""Rows of a batch, where a route names a tuning for each."""

from __future__ import annotations

from torch import Tensor

from mmpeft.errors import ConfigError


def row_count_error(rows: int, batch: int) -> ConfigError:
    """The error for a route of another length than the batch."""
    return ConfigError(
        f"use() named an adapter for {rows} rows, but the batch has {batch}; give one name (or None) for each row"
    )


def folds(x: Tensor, batch: int) -> int:
    """How many entries of dimension 0 one row has, one behind the other: windows or frames that the backbone folds in.

    Raises:
        ConfigError: the rows do not divide them.
    """
    fold, rest = divmod(x.shape[0], batch)
    if rest or not fold:
        raise row_count_error(batch, x.shape[0])
    return fold
