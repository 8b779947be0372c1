"""The content of an allocation plan: which sites get a module, which tensors train whole, which entries alone."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmpeft.errors import AdapterFileError
from mmpeft.types import Argument, Facts, Json, Leaf

FORMAT, VERSION = "mmpeft-plan", 1
ENCODING = "base64(zlib(little-endian uint32 gaps of ascending flat indices))"


def pack(indices: Tensor) -> str:
    """Ascending flat indices as text: the gaps between them, compressed."""
    flat = indices.cpu().long()
    gaps = torch.diff(flat, prepend=torch.zeros(1, dtype=torch.int64))
    return base64.b64encode(zlib.compress(gaps.to(torch.uint32).numpy().astype("<u4").tobytes(), 9)).decode()


def unpack(text: str) -> Tensor:
    """The ascending flat indices that `pack` wrote, int64."""
    data = bytearray(zlib.decompress(base64.b64decode(text)))
    return torch.frombuffer(data, dtype=torch.uint32).long().cumsum(0)


def read_plan(source: str | Path | Facts) -> Json:
    """A plan's content, from a file or as it is, checked for what this version can read.

    Raises:
        AdapterFileError: missing, not JSON, foreign, newer, or only a part of a plan.
    """
    where = "the plan"
    content: Leaf = source
    if isinstance(source, str | Path):
        where = str(source)
        if not Path(source).is_file():
            raise AdapterFileError(f"no plan at {source}; mmpeft.allocate(...).save({str(source)!r}) writes one")
        try:
            content = json.loads(Path(source).read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise AdapterFileError(f"{where} is no JSON file, or only a part of one: {error}") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise AdapterFileError(f"{where}: expected a plan (format {FORMAT!r}), got {str(content)[:60]!r}")
    if content["version"] > VERSION:
        raise AdapterFileError(
            f"{where} has version {content['version']}, this mmpeft reads up to {VERSION}; update mmpeft"
        )
    missing = [key for key in ("model", "structured", "whole", "sparse") if key not in content]
    if missing:
        raise AdapterFileError(f"{where} lacks {missing}; it was written in part or edited")
    return dict(content)


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
