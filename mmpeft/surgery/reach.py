"""Which parts of a tuning does a forward pass come by?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.parts.base import Part, Placement
from mmpeft.surgery.liveness import call
from mmpeft.types import AnyFunc, Args, Argument, Attribute, Batch, Kwargs, Output, TorchOp

ENTRIES = ("enter", "exit", "read", "around", "extend")
"""Methods by which a forward pass enters a part that owns no tensor."""


def reached(model: nn.Module, placements: Sequence[Placement], batch: Batch) -> list[Placement]:
    """Those of `placements` that no forward pass entered: one pass on an example, without gradients, in eval mode.

    A part with tensors is entered when an operation reads one of them: a module may ask for a part and compute
    without it. A part without any is entered when one of its hooks runs. `batch` is a tensor, a tuple of arguments or
    a mapping of keyword arguments. The model is left as it was, attributes that its pass sets included.
    """
    watched = [p for p in placements if not p.part.resting]
    owned = {id(t): p.part for p in watched for t in (*p.part.parameters(), *p.part.buffers())}
    calls = {id(p.part): p.part for p in watched if not any(True for _ in p.part.parameters())}
    seen: set[int] = set()
    with _as_it_was(model), _called(list(calls.values()), seen), torch.no_grad(), _Reading(owned, seen):
        call(model, batch)
    return [p for p in watched if id(p.part) not in seen]


class _Reading(TorchDispatchMode):
    """Notes whose tensors operations read."""

    def __init__(self, owned: dict[int, Part], seen: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.owned, self.seen = owned, seen

    def __torch_dispatch__(self, func: TorchOp, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and id(value) in self.owned:
                self.seen.add(id(self.owned[id(value)]))
        return func(*args, **(kwargs or {}))


@contextmanager
def _called(parts: Sequence[Part], seen: set[int]) -> Iterator[None]:
    """Notes which of the parts have a hook run."""

    def noted(part: Part, name: str) -> AnyFunc:
        own = getattr(part, name)

        def run(*args: Argument, **kwargs: Argument) -> Output:
            seen.add(id(part))
            return own(*args, **kwargs)

        return run

    names = [(part, name) for part in parts for name in ENTRIES if hasattr(part, name)]
    try:
        for part, name in names:
            part.__dict__[name] = noted(part, name)
        yield
    finally:
        for part, name in names:
            part.__dict__.pop(name, None)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, attributes, buffers and random state come back on exit."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    held: list[dict[str, Attribute]] = [table for m in modules for table in (m._buffers, m._modules)]
    tables = [(table, dict(table)) for table in held]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, before in zip(modules, attributes):
            for name in set(module.__dict__) - set(before):
                del module.__dict__[name]
            module.__dict__.update(before)
        for table, known in tables:
            if [(n, id(v)) for n, v in table.items()] != [(n, id(v)) for n, v in known.items()]:
                table.clear()
                table.update(known)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
