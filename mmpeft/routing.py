"""Which tuning each row of a batch uses, and how hosts carry it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmpeft.errors import ConfigError
from mmpeft.parts.base import Part
from mmpeft.recompute import is_cache
from mmpeft.running import Planned
from mmpeft.together import Entry


def row_groups(route: Iterable[Entry]) -> dict[Entry, list[int]]:
    """Row numbers of each entry, in order of first appearance."""
    groups: dict[Entry, list[int]] = {}
    for row, name in enumerate(route):
        groups.setdefault(name, []).append(row)
    return groups


class RowPart(Part):
    """Runs a part on some rows of the batch only.

    Backbones that fold windows or frames into the batch see `k` times as many rows; the rows of one sample
    are then consecutive.
    """

    def __init__(self, part: Part, rows: list[int], batch: int) -> None:
        super().__init__()
        self._part = (part,)  # a tuple: the part stays registered under its own host only
        self.rows, self.batch = rows, batch

    def _index(self, x: Tensor) -> Tensor:
        fold, rest = divmod(x.shape[0], self.batch)
        if rest:
            raise ConfigError(
                f"use() named an adapter for {self.batch} rows, but the batch has {x.shape[0]}; "
                "give one name (or None) for each row"
            )
        rows = torch.tensor(self.rows, device=x.device)
        return rows if fold == 1 else (rows[:, None] * fold + torch.arange(fold, device=x.device)).flatten()

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        index = self._index(x)
        return x.index_copy(0, index, self._part[0].enter(host, x[index]))

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        index = self._index(y)
        return y.index_copy(0, index, self._part[0].exit(host, x[index], y[index]))


class Grouped:
    """Runs the whole model once for each distinct name and puts the rows back in order.

    Needed where parts change what no single pass can hold: prompts of another length, trained norms. An output
    that mixes the rows of a batch (logits of every image with every text) has no value then and is None.
    """

    def __init__(self, route: Sequence[Entry], plan: Callable[[Entry], Planned]) -> None:
        self.route, self.plan = tuple(route), plan

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = len(self.route)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()]
        if tensors and tensors[0].shape[0] != batch:
            raise ConfigError(
                f"use() named an adapter for {batch} rows, but the batch has {tensors[0].shape[0]}; "
                "give one name (or None) for each row"
            )
        if any(is_cache(value) for value in (*args, *kwargs.values())):
            raise ConfigError(
                "the rows in use() need passes of their own, which cannot write into one key-value cache: generate for "
                "one name at a time, or pass use_cache=False"
            )
        groups = row_groups(self.route)
        outputs = []
        for name, rows in groups.items():

            def take(value: Any, rows: list[int] = rows) -> Any:
                own = isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
                return value[rows] if own else value

            outputs.append(run(self.plan(name), tree_map(take, args), tree_map(take, kwargs)))
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()

        def join(*values: Any) -> Any:
            if isinstance(values[0], Tensor) and values[0].dim():
                if len({value.shape[1:] for value in values}) > 1:
                    return None
                return torch.cat(values)[order.to(values[0].device)]
            return None if is_cache(values[0]) else values[0]

        return tree_map(join, *outputs)
