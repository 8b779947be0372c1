"""One named entry of a bank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmpeft.bank.heads import Head
from mmpeft.methods.base import Method
from mmpeft.types import Json


class Entry(nn.Module):
    """What a bank keeps under one name, beside the parts that a method hangs under the model.

    `head` scores features, `learned` are parameters of its own (keys, gains), `state` tensors that no optimiser
    moves, `meta` JSON-ready facts. `method` is None for an entry that tunes nothing.
    """

    def __init__(self, method: Method | None = None, head: Head | None = None) -> None:
        super().__init__()
        self.method, self.head = method, head
        self.learned = nn.ParameterDict()
        self.state: dict[str, Tensor] = {}
        self.meta: Json = {}
        self.frozen = False

    @property
    def keys(self) -> Tensor | None:
        """What queries are compared with, [n, d]: learned (`learned["key"]`) or fixed (`state["key"]`)."""
        stored = self.learned if "key" in self.learned else self.state
        return stored.get("key", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to(device)` reaches the state too."""
        self.state = {name: fn(tensor) for name, tensor in self.state.items()}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
