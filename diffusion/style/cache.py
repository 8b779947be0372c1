"""What frozen encoders make of texts and images, computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mmpeft.diffusion.family import Family
from mmpeft.files import may_write, write_atomic
from mmpeft.hosting.quantized import dense
from mmpeft.types import Untyped

Entry = dict[str, Tensor]


VERSION = 2  # of what this package does around the encoders: another one is another file


class Cache:
    """Entries of named tensors by key, in memory and, with a folder, in safetensors files that other runs find again.

    A file's name is the hash of its key and of all that the value depends on: the encoders' weights, bit for bit and in
    their type, their configuration, `facts` of what is done around them, autocast, and the versions of the libraries.
    So nothing stale is read. A file that is not whole is computed anew.
    """

    def __init__(self, encoders: Sequence[nn.Module], folder: Path | None = None, *facts: object) -> None:
        """
        Args:
            encoders: the frozen networks that compute the values.
            folder: where files are kept; None for memory alone.
            facts: what else the values depend on, with a `repr` that says all of it.
        """
        self.encoders, self.facts, self.folder = list(encoders), facts, folder
        self.known: dict[str, Entry] = {}

    @cached_property
    def identity(self) -> str:
        """A hash of the encoders, the facts and the libraries."""
        found = hashlib.sha256(repr((VERSION, [library.__version__ for library in (torch, PIL)], self.facts)).encode())
        for name in ("diffusers", "transformers"):
            found.update(version(name).encode())
        for encoder in self.encoders:
            found.update(f"{type(encoder).__name__}{described(encoder)}".encode())
            for name, tensor in encoder.state_dict().items():
                found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                values = dense(tensor).detach().cpu().contiguous()
                found.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

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
        if self.folder is None:
            return None
        kinds = ("cuda", "cpu")
        autocast = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
        name = hashlib.sha256(f"{self.identity}|{autocast}|{key}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

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


def described(part: Untyped) -> str:
    """A component's configuration, without where it came from."""
    known: Untyped = getattr(part, "config", None)
    facts = known.to_dict() if hasattr(known, "to_dict") else dict(known or {})
    return repr(sorted((key, repr(value)) for key, value in facts.items() if not key.startswith("_")))


def tokenized(tokenizer: Untyped) -> str:
    """How a tokenizer takes texts apart: what it is made of, without what its last call has left in it."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        made = {k: v for k, v in json.loads(fast.to_str()).items() if k not in ("truncation", "padding")}
    else:
        made = tokenizer.get_vocab()
    sides = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side)
    special = sorted(tokenizer.special_tokens_map.items())
    return repr((type(tokenizer).__name__, sorted(made.items(), key=str), special, sides))


def text_facts(family: Family) -> tuple[object, ...]:
    """What text features depend on beside the encoders."""
    read = [(tokenized(tokenizer), limit) for tokenizer, limit in family.contexts]
    named = family.pipeline.components.items()
    every = [tokenized(part) for name, part in named if name.startswith("tokenizer") and part is not None]
    return ("text", type(family).__name__, type(family.pipeline).__name__, read, every)


def latent_facts(family: Family) -> tuple[object, ...]:
    """What latents depend on beside the autoencoder, whose configuration has the scaling."""
    return ("latents", type(family).__name__, type(family.pipeline).__name__, family.scale)
