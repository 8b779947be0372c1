"""The content of an allocation plan: which sites get a module, which tensors train whole, which entries alone."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmpeft.errors import AdapterFileError
from mmpeft.files import read_file
from mmpeft.types import Argument, Facts, Json, Leaf

MOST_BYTES = 2**31
FORMAT, VERSION = "mmpeft-plan", 1
ENCODING = "base64(zlib(little-endian uint32 gaps of ascending flat indices))"


def pack(indices: Tensor) -> str:
    """Ascending flat indices as text: the gaps between them, compressed."""
    flat = indices.cpu().long()
    gaps = torch.diff(flat, prepend=torch.zeros(1, dtype=torch.int64))
    return base64.b64encode(zlib.compress(gaps.to(torch.uint32).numpy().astype("<u4").tobytes(), 9)).decode()


def unpack(text: str, count: int, elements: int) -> Tensor:
    """The `count` ascending flat indices below `elements` that `pack` wrote, int64.

    Raises:
        AdapterFileError: other text, more or fewer indices, or some that are not ascending or too large.
    """
    try:
        packed = zlib.decompressobj()
        data = bytearray(packed.decompress(base64.b64decode(text, validate=True), 4 * min(count, elements) + 1))
        if len(data) != 4 * count or packed.unconsumed_tail or not packed.eof:
            raise ValueError(f"expected {count:,} indices, got others")
        found = torch.frombuffer(data, dtype=torch.uint32).long().cumsum(0) if data else torch.empty(0).long()
    except (ValueError, TypeError, zlib.error) as error:
        raise AdapterFileError(f"the plan's indices are damaged: {error}") from error
    if (torch.diff(found) <= 0).any() or (len(found) and int(found[-1]) >= elements):
        raise AdapterFileError(f"the plan's indices are not ascending numbers below {elements:,}")
    return found


def read_plan(source: str | Path | Facts) -> Json:
    """A plan's content, from a file or as it is, checked for what this version can read.

    Raises:
        AdapterFileError: missing, not JSON, foreign, newer, or only a part of a plan.
    """
    where = "the plan"
    content: Leaf = source
    if isinstance(source, str | Path):
        where = str(source)
        if not Path(source).exists():
            raise AdapterFileError(f"no plan at {source}; mmpeft.allocate(...).save({str(source)!r}) writes one")
        text = read_file(Path(source), MOST_BYTES, AdapterFileError)
        try:
            content = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise AdapterFileError(f"{where} is no JSON file, or only a part of one: {error}") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise AdapterFileError(f"{where}: expected a plan (format {FORMAT!r}), got {str(content)[:60]!r}")
    _check_types(content, where)
    if content["version"] > VERSION:
        raise AdapterFileError(
            f"{where} has version {content['version']}, this mmpeft reads up to {VERSION}; update mmpeft"
        )
    missing = [key for key in ("model", "structured", "whole", "sparse") if key not in content]
    if missing:
        raise AdapterFileError(f"{where} lacks {missing}; it was written in part or edited")
    return dict(content)


def _check_types(content: Facts, where: str) -> None:
    """Raise AdapterFileError where a field is of another type than plans have there."""
    kinds: Mapping[str, type] = {"version": int, "structured": list, "whole": list, "sparse": dict, "units": list}
    for key, kind in kinds.items():
        if not isinstance(content.get(key, kind()), kind):
            raise AdapterFileError(f"{where}: {key} is a {type(content[key]).__name__}, expected a {kind.__name__}")
    if "version" not in content:
        raise AdapterFileError(f"{where} lacks ['version']; it was written in part or edited")
    whole, structured, sparse = (content.get(key, ()) for key in ("whole", "structured", "sparse"))
    fits = all(isinstance(name, str) for name in whole)
    fits &= all(
        isinstance(group, Mapping)
        and isinstance(group.get("method"), Mapping)
        and isinstance(group.get("sites"), list)
        and all(
            isinstance(s, list | tuple) and len(s) == 2 and all(isinstance(n, str) for n in s) for s in group["sites"]
        )
        for group in structured
    )
    fits &= all(
        isinstance(entry, Mapping)
        and isinstance(entry.get("indices"), str)
        and type(entry.get("count")) is int
        and isinstance(entry.get("shape"), list)
        and all(type(size) is int and size >= 0 for size in entry["shape"])
        and 0 <= entry["count"] <= math.prod(entry["shape"])
        for entry in dict(sparse).values()
    )
    if not fits:
        raise AdapterFileError(f"{where}: its modules, tensors or entries are not written as a plan has them")


def plan_content(
    model: str,
    *,
    structured: list[Json] | None = None,
    whole: list[str] | None = None,
    sparse: Mapping[str, Tensor] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    units: list[Json] | None = None,
    **known: Argument,
) -> Json:
    """JSON-ready content; `sparse` maps tensor names to ascending flat indices, `units` is an account for people."""
    entries = {
        name: {"shape": list((shapes or {})[name]), "count": len(indices), "indices": pack(indices)}
        for name, indices in (sparse or {}).items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        **known,
        "structured": structured or [],
        "whole": whole or [],
        "sparse": entries,
        "encoding": ENCODING,
        "units": units or [],
    }
