"""`Bank`: named entries of any method on one frozen model, added at any time, routed sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.bank.compose import fill, summed
from mmpeft.bank.entry import Entry
from mmpeft.bank.heads import Head, PrototypeHead
from mmpeft.bank.router import Choice, nearest_keys
from mmpeft.errors import ConfigError, Refused, StateError, nearest
from mmpeft.methods.base import Method
from mmpeft.surgery.choice import use
from mmpeft.surgery.state import state_of
from mmpeft.surgery.together import Entry as RouteEntry
from mmpeft.surgery.together import Together, names_of
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.tuning import Tuning, attach
from mmpeft.types import Argument, Batch

Rows = RouteEntry | Sequence[RouteEntry]
Extract = Callable[[nn.Module, Batch], Tensor]


def call(model: nn.Module, inputs: Batch) -> Tensor:
    """`model(inputs)`, the features of a backbone without a head."""
    found: Tensor = model(inputs)
    return found


class Bank(nn.Module):
    """Named entries on one frozen model; their number is open.

    bank = mmpeft.Bank(timm.create_model("vit_base_patch16_224", num_classes=0))
    bank.add_task("birds", mmpeft.LoRA(rank=8), head=LinearHead(768, range(20)))
    ...                                        # train bank.trainable_parameters()
    bank.freeze("birds")
    bank.add_task("cars", mmpeft.LoRA(rank=8), head=LinearHead(768, range(20, 40)))
    features = bank.features(images, ["birds", "cars", None])

    `extract(model, inputs)` gives the features [B, d] that heads and queries work on. What runs (`features`, `route`)
    and what trains (`freeze`, `unfreeze`) are independent of each other.
    """

    def __init__(self, model: nn.Module, extract: Extract = call) -> None:
        super().__init__()
        if isinstance(model, Bank) or not isinstance(model, nn.Module):
            raise ConfigError(f"Bank expects a model, got {type(model).__name__}")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model, self.extract = model, extract
        self.entries = nn.ModuleDict()

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.entries

    @property
    def ids(self) -> list[str]:
        """Names of the entries in the order in which they came."""
        return list(self.entries)

    def __getitem__(self, name: str) -> Entry:
        """One entry.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.entries:
            raise ConfigError(f"the bank has no entry {name!r}; it has {self.ids or 'none'}.{nearest(name, self.ids)}")
        entry = self.entries[name]
        assert isinstance(entry, Entry)
        return entry

    # -- entries --------------------------------------------------------------------------------------------

    def add_task(self, name: str, method: Method | None = None, head: Head | None = None, **options: Argument) -> Entry:
        """Add an entry; what runs at present stays what it is. `options` go to `attach`.

        Raises:
            ConfigError: the name is taken or no identifier.
        """
        if name in self.entries:
            raise StateError(f"the bank has an entry {name!r} already; remove() it or choose another name")
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"the name of an entry must be a plain identifier, got {name!r}")
        with unchanged_on_error(self):
            if method is not None:
                method = attach(self.model, method, name, run=False, **options).method
            entry = Entry(method, head)
            entry.to(next(self.model.parameters()).device)
            self.entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Drop an entry and its parts."""
        if self[name].method is not None:
            self.tuning(name).detach()
        del self.entries[name]

    def tuning(self, name: str) -> Tuning:
        """The handle on an entry's parts: report, save, export, controllers."""
        if self[name].method is None:
            raise ConfigError(f"entry {name!r} tunes nothing: it was added without a method")
        return Tuning(self.model, name)

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """Everything an entry can train: its parts, head and own parameters."""
        if self[name].method is not None:
            yield from self.tuning(name).parameters()
        yield from self[name].parameters()

    def freeze(self, name: str) -> None:
        """Train no tensor of an entry; it runs as before."""
        for parameter in self.parameters_of(name):
            parameter.requires_grad_(False)
            parameter.grad = None
        self[name].frozen = True

    def unfreeze(self, name: str) -> None:
        """Train an entry again."""
        for parameter in self.parameters_of(name):
            parameter.requires_grad_(True)
        self[name].frozen = False

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser gets: every tensor of every entry that is not frozen."""
        return [p for name in self.ids for p in self.parameters_of(name) if p.requires_grad]

    # -- what runs ------------------------------------------------------------------------------------------

    def using(self, rows: Rows) -> AbstractContextManager[object]:
        """Run these entries inside a `with` block; those without a method stand for the plain model."""
        route = self._plain(rows)
        if state_of(self.model) is None:
            return nullcontext()
        return use(self.model, route)

    def _plain(self, rows: Rows) -> Rows:
        """What `mmpeft.use` takes, with every name checked."""
        route = rows if rows is None or isinstance(rows, str | Together) else tuple(rows)
        tuned = {name: self[name].method is not None for name in names_of(route)}

        def one(entry: RouteEntry) -> RouteEntry:
            if isinstance(entry, Together):
                lacking = [name for name in entry.names if not tuned[name]]
                if lacking:
                    raise ConfigError(f"entries {lacking} tune nothing, so they cannot run together with others")
                return entry
            return entry if entry is None or tuned[entry] else None

        return tuple(map(one, route)) if isinstance(route, tuple) else one(route)

    def features(self, inputs: Batch, rows: Rows = None) -> Tensor:
        """Features [B, d] with one entry for all rows, or one (or several `Together`, or None) for each row."""
        with self.using(rows):
            return self.extract(self.model, inputs)

    @torch.no_grad()
    def query(self, inputs: Batch) -> Tensor:
        """Features of the frozen model with every entry switched off, in evaluation mode: the same backbone."""
        training = self.model.training
        self.model.eval()
        try:
            return self.features(inputs, None)
        finally:
            self.model.train(training)

    def route(
        self, rows: Tensor | Sequence[str | int], by: Literal["name", "task", "key", "prototype"] = "name", top: int = 1
    ) -> Choice:
        """Choose entries for each row, and for each row alone.

        `name`: `rows` are names. `task`: numbers in the order of adding. `key`, `prototype`: `rows` are queries [B, d],
        compared by cosine with the entries' keys, or with the class means in their `PrototypeHead`s.

        Raises:
            ConfigError: an unknown name or number, or nothing to compare with.
        """
        if by in ("key", "prototype"):
            if not isinstance(rows, Tensor) or rows.dim() != 2:
                raise ConfigError(f"routing by {by} compares queries [B, d]: pass bank.query(inputs)")
            return nearest_keys(rows, self._means() if by == "prototype" else self.keys(), top)
        if by not in ("name", "task"):
            raise ConfigError(f"by is 'name', 'task', 'key' or 'prototype', got {by!r}")
        known = self.ids
        index = []
        for row in rows.tolist() if isinstance(rows, Tensor) else rows:
            if by == "name":
                self[str(row)]
                index.append(known.index(str(row)))
            elif not isinstance(row, int) or not 0 <= row < len(known):
                raise ConfigError(f"task {row!r} is none of the {len(known)} entries: {', '.join(known)}")
            else:
                index.append(row)
        chosen = torch.tensor(index, dtype=torch.int64)[:, None]
        return Choice(tuple(known), chosen, torch.ones(chosen.shape))

    def keys(self) -> dict[str, Tensor]:
        """Keys [n, d] of the entries that have any."""
        return {name: key for name in self.ids if (key := self[name].keys) is not None}

    def _means(self) -> dict[str, Tensor]:
        heads = {name: self[name].head for name in self.ids}
        return {name: head.means for name, head in heads.items() if isinstance(head, PrototypeHead)}

    # -- several as one -------------------------------------------------------------------------------------

    def merge(self, names: Sequence[str], weights: Sequence[float] | None = None, into: str = "merged") -> Entry:
        """Add the entry that computes `Σ w_i ΔW_i` (by default their mean), frozen; the others stay.

        Raises:
            Refused: a part is not linear in what it adds; nothing is changed then.
        """
        names = list(names)
        method, tensors = self._summed(names, [1 / max(len(names), 1)] * len(names) if weights is None else weights)
        return self._written(into, method, tensors)

    def _summed(self, names: Sequence[str], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
        if not names:
            raise ConfigError("expected names of entries to merge, got none")
        for name in names:
            if self[name].method is None:
                raise Refused(f"entry {name!r} tunes nothing that could be merged")
        return summed([self.tuning(name).placements for name in names], [float(w) for w in weights])

    def _written(self, name: str, method: Method, tensors: dict[str, Tensor]) -> Entry:
        with unchanged_on_error(self):
            entry = self.add_task(name, method)
            fill(self.tuning(name).placements, tensors)
            self.freeze(name)
        return entry

    def fold(self, names: Sequence[str], weights: Sequence[float] | None = None, into: str = "folded") -> Entry:
        """Replace entries by their sum (weights 1): memory stays flat however many are folded.

        `into` may be one of the names: the sum then grows in place.

        Raises:
            Refused: as `merge`; nothing is changed then.
        """
        method, tensors = self._summed(names, [1.0] * len(names) if weights is None else weights)
        if into in self and into not in names:
            raise StateError(f"the bank has an entry {into!r} already, which is not among those folded")
        with unchanged_on_error(self):
            for name in names:
                self.remove(name)
            return self._written(into, method, tensors)

    # -- files ----------------------------------------------------------------------------------------------

    def export(self, name: str, folder: str | Path) -> Path:
        """Write one entry's tuning as an adapter folder of its own, for `mmpeft.load`."""
        return self.tuning(name).save(folder)

    def save(self, folder: str | Path) -> Path:
        """Write `bank.json` and one safetensors file an entry, atomically; return the folder."""
        from mmpeft.bank.files import save

        return save(self, Path(folder))

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path, extract: Extract = call) -> Bank:
        """The bank that `save` wrote, on the same model.

        Raises:
            AdapterFileError: no bank, partial, tampered with, or made for another base (both fingerprints are named).
        """
        from mmpeft.bank.files import load

        with unchanged_on_error(model, parts=True):
            return load(cls(model, extract), Path(folder))
