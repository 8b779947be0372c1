"""Atomic writes: a reader sees the old file or the new one, never a part."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

from mmpeft.errors import MMPEFTError
from mmpeft.types import Argument, Untyped


def write_atomic(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder: fsync, rename, fsync of the folder.

    Raises:
        MMPEFTError: the disk is full or not writable; the former file is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise MMPEFTError(
            f"cannot write {path} ({len(data):,} bytes): {error}; what was there before is whole"
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    """The process's umask; temporary files are private until they take their final place."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def png_of(figure: Untyped, **options: Argument) -> bytes:
    """A matplotlib figure as the content of a PNG file; options as for `savefig`."""
    out = io.BytesIO()
    figure.savefig(out, format="png", **options)
    return out.getvalue()
