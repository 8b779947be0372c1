"""Saved adapters as material of a method. Methods know no files: `mmpeft.formats` says how a folder is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.parts.base import Placement


@dataclass(frozen=True)
class Adapter:
    """A trained adapter apart from any model: its method, its parts where they stood, and their tensors."""

    where: str
    method: Method
    placements: list[Placement]
    tensors: dict[str, Tensor]


READERS: list[Callable[[nn.Module, str | Path], Adapter]] = []
"""How an adapter's folder is read for a model; filled by whoever knows the files, when imported."""


def read_adapter(model: nn.Module, folder: str | Path) -> Adapter:
    """An adapter from a folder, made for this very model, which stays as it is.

    Raises:
        AdapterFileError: no adapter folder, a damaged one, or one made for another base.
        ConfigError: nobody who reads adapter folders is imported.
    """
    if not READERS:
        raise ConfigError(f"nothing that reads the adapter folder {folder} is imported yet: import mmpeft.tuning first")
    return READERS[0](model, folder)
