"""What frozen encoders make of texts and images, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mmpeft.files import may_write, write_atomic
from mmpeft.formats.fingerprint import Fingerprint

Entry = dict[str, Tensor]


class Cache:
    """Entries of named tensors by key, in memory and, with a folder, in safetensors files that other runs find again.

    A file's name is the hash of its key and of the encoder's weights: another encoder, image or transform is another
    file, so that nothing stale is read. A file that is not whole is computed anew.
    """

    def __init__(self, encoders: Sequence[nn.Module], folder: Path | None = None) -> None:
        self.encoder = "-".join(Fingerprint.of(encoder).digest for encoder in encoders)
        self.folder = folder
        self.known: dict[str, Entry] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def fill(
        self, keys: Sequence[str], compute: Callable[[list[int]], list[Entry]], at_once: int = 16
    ) -> dict[str, Entry]:
        """The entries of keys; `compute` gives those of the positions that are nowhere yet, `at_once` at a time."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        for key in first:
            if key not in self.known and (found := self._read(key)) is not None:
                self.known[key] = found
        missing = [i for key, i in first.items() if key not in self.known]
        for start in range(0, len(missing), at_once):
            rows = missing[start : start + at_once]
            for row, entry in zip(rows, compute(rows), strict=True):
                self.known[keys[row]] = {
                    n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in entry.items()
                }
                self._write(keys[row])
        return {key: self.known[key] for key in first}

    def stacked(self, keys: Sequence[str], device: torch.device | str) -> Entry:
        """The entries of keys, which all must be here, as batches [B, …]."""
        entries = [self.known[key] for key in keys]
        return {name: torch.stack([entry[name] for entry in entries]).to(device) for name in entries[0]}

    def _path(self, key: str) -> Path | None:
        name = hashlib.sha256(f"{self.encoder}|{key}".encode()).hexdigest()[:32]
        return self.folder and self.folder / f"{name}.safetensors"

    def _read(self, key: str) -> Entry | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            return load(path.read_bytes())
        except SafetensorError:
            return None

    def _write(self, key: str) -> None:
        path = self._path(key)
        if path is not None and may_write():
            write_atomic(path, save(self.known[key]))
