"""Trained rows of tables: under which names of a tied tensor a file's rows act, as PEFT has it.

Rows of the table that reads words act under all names of its tensor (a tied head reads them too), those of any other
module under its own name alone. Where a head has rows of its own, and others than the table, the two are apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, MMPEFTWarning, Refused
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at
from mmpeft.methods.recipe import identity
from mmpeft.types import AnyModule

Rows = tuple[tuple[int, ...], Tensor]
"""Which rows of a table [n], and their values [n, d]."""


def table_of(
    model: nn.Module,
    names: tuple[str, ...],
    shared: Sequence[str],
    tables: Mapping[tuple[str, ...], Mapping[int, Tensor]],
) -> str:
    """The module whose rows in a file change a tensor under exactly these of its `shared` names.

    `tables` are all rows of the tuning, by the names that they act under.

    Raises:
        Refused: there is none.
    """
    for name in names:
        path = name.rpartition(".")[0]
        apart = [rows for own, rows in tables.items() if own != names and set(own) < set(shared)]
        alone = bool(apart) and all(set(rows) != set(tables[names]) for rows in apart)
        if set(names) == ({name} if alone else set(_reached(model, path, shared))):
            return path
    raise Refused(f"{list(names)} are trained in part; {list(shared)} are one tensor, and PEFT changes them together")


def placed_rows(
    model: nn.Module,
    path: str,
    words: Mapping[str, Rows],
    tied: Mapping[Hashable, Sequence[str]],
    where: object,
) -> tuple[list[str], Rows]:
    """The names of tensors that take a file's rows of the module `path`, and the rows, each index once.

    No names where another module's rows are the same and act here too.

    Raises:
        AdapterFileError: the model has no such table, or one of fewer rows.
    """
    indices, rows = words[path]
    modules = dict(model.named_modules())
    weight = base_value(modules[path], "weight") if path in modules else None
    if weight is None or weight.dim() != 2 or rows.shape[1] != weight.shape[1] or max(indices) >= len(weight):
        raise AdapterFileError(
            f"{where}: {path} has rows {list(rows.shape)} up to {max(indices)}, the model's table is "
            f"{'missing' if weight is None else list(weight.shape)}; build the model with as many words"
        )
    last = {index: place for place, index in enumerate(indices)}
    kept = tuple(last), rows[list(last.values())]
    own = f"{path}.weight"
    shared = tied[identity(model, own)]
    same = {other for other in words if words[other][0] == indices and torch.equal(words[other][1], rows)}
    if any(o != path and f"{o}.weight" in shared and own in _reached(model, o, shared) for o in same):
        return [], kept
    reached = {name: name.rpartition(".")[0] for name in _reached(model, path, shared)}
    names = [name for name, other in reached.items() if other in same or other not in words]
    _say_lost_biases(model, names, where)
    return names, kept


def _reached(model: AnyModule, path: str, names: Sequence[str]) -> Sequence[str]:
    read = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return names if module_at(model, path) is read else [name for name in names if name.rpartition(".")[0] == path]


def _say_lost_biases(model: nn.Module, names: Sequence[str], where: object) -> None:
    for path in (name.rpartition(".")[0] for name in names):
        if getattr(module_at(model, path), "bias", None) is not None:
            warnings.warn(
                f"{where}: {path} has rows of its own and a bias, which PEFT leaves out where it runs such rows; here "
                "it stays, as it does in a merged model",
                MMPEFTWarning,
                stacklevel=2,
            )
