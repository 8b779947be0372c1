"""Files: written whole or not at all, read with a limit, and folders that several processes write and read at once.

A writer holds a lock on what it has not finished. The kernel drops it when the process dies, however it dies; so what
is unfinished and unlocked belongs to nobody, and the next writer sweeps it away.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Final, TypeVar

from mmpeft.errors import FileError
from mmpeft.types import Argument, Untyped

try:
    import fcntl
except ModuleNotFoundError:  # Windows: one writer at a time is then the user's care
    fcntl = None  # type: ignore[assignment]  # the module or none

T = TypeVar("T")
UNFINISHED: Final = ".mmpeft-tmp"
PATIENCE: Final = 100
"""How often a reader begins anew because a writer has come in between."""

_swept: set[str] = set()
_reading: ContextVar[str] = ContextVar("reading", default="")


def write_atomic(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder: fsync, rename, fsync of the folder.

    Raises:
        FileError: the disk is full, the place is not writable or the name too long; the former file is whole.
    """
    temporary: Path | None = None
    try:
        with explained(path, f" ({len(data):,} bytes)"):
            _sweep_once(path.parent)
            handle, temporary = _unfinished_file(path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:  # while it is locked, so that nobody takes it for a dead writer's
                    os.replace(temporary, path)
            if fcntl is None:  # no open file is renamed there
                os.replace(temporary, path)
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems know no fsync of folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what is being written; gone afterwards, unless it was moved into place.

    Raises:
        FileError: the place is not writable, or the disk is full.
    """
    folder, handle = None, -1
    try:
        with explained(target):
            _sweep_once(target.parent)
            folder = target.parent / _name()
            folder.mkdir()
            handle = os.open(folder, os.O_RDONLY) if fcntl is not None else -1
            _lock(handle)
            yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def put_files(new: Path, folder: Path, last: str) -> None:
    """Move every file of a scratch folder to its place in another, over what is there; `last` makes them valid."""
    for file in sorted((file for file in new.rglob("*") if file.is_file()), key=lambda file: file.name == last):
        target = folder / file.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Have a folder to oneself among its writers, threads and processes; readers are not kept out.

    Raises:
        FileError: the folder cannot be made or is not writable.
    """
    with explained(folder):
        handle = _own(folder)
        try:
            sweep(folder)
            yield
        finally:
            if handle >= 0:
                fcntl.flock(handle, fcntl.LOCK_UN)  # forked children hold the same lock
                os.close(handle)


def _own(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return -1
        handle = os.open(folder, os.O_RDONLY)
        if not _lock(handle, wait=True):
            os.close(handle)
            return -1
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        os.close(handle)  # removed, or replaced, while we waited


def read_steadily(read: Callable[[], T], manifest: Path) -> T:
    """What `read` finds in a folder whose `manifest` names the other files, though a writer replaces them meanwhile.

    A failure counts only where the manifest was the same before and after it.
    """
    for _ in range(PATIENCE):
        before = _stamp(manifest)
        try:
            return read()
        except FileError:
            if _stamp(manifest) == before:
                raise
    return read()


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_file(path: Path, limit: int, error: type[FileError] = FileError) -> bytes:
    """A file's content. Nothing but a regular file is opened.

    Raises:
        FileError: missing, no file, longer than `limit` bytes, or not readable.
    """
    check_file(path, limit, error)
    try:
        return path.read_bytes()
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason}") from reason


def check_file(path: Path, limit: int, error: type[FileError] = FileError) -> None:
    """Raise unless a path is a regular file of at most `limit` bytes: a pipe or a device might never end."""
    try:
        found = path.stat()
    except FileNotFoundError as reason:
        raise error(f"{path} does not exist") from reason
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        raise error(f"{path} cannot be read: {reason}") from reason
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is {kind_of(found.st_mode)}; expected a file")
    if found.st_size > limit:
        raise error(f"{path} has {found.st_size:,} bytes; such a file has at most {limit:,}")


def kind_of(mode: int) -> str:
    """What is there in place of a file."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_one, name in kinds if is_one(mode)), "a device")


def make_folder(path: Path) -> bool:
    """Make a folder that is not there yet; False where it is, or somebody else was first.

    Raises:
        FileError: the place is not writable.
    """
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if path.is_dir():
                return False
            raise
    return True


# -- what dead writers leave --------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Remove what killed writers have left unfinished; what somebody still writes is locked, and stays."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(UNFINISHED) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_if_dead(Path(entry.path), entry.is_dir())


def _remove_if_dead(path: Path, is_folder: bool) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if _lock(handle):
            shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _sweep_once(folder: Path) -> None:
    """Make the folder; the first write of a process into one sweeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    key = str(folder.absolute())
    if key not in _swept:
        _swept.add(key)
        sweep(folder)


def _unfinished_file(folder: Path) -> tuple[int, Path]:
    while True:
        path = folder / _name()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        _lock(handle, wait=True)
        if fcntl is None or os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)  # swept before it was locked


def _name() -> str:
    """Short whatever the final name is: long names leave no room for more."""
    return f".{secrets.token_hex(8)}{UNFINISHED}"


def _lock(handle: int, wait: bool = False) -> bool:
    """Lock a file or folder until it is closed; False where another has it, or the file system knows no locks."""
    if fcntl is None or handle < 0:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def explained(path: Path, what: str = "") -> Iterator[None]:
    """Say of every refusal of the system that `path` cannot be written, and refuse at once where nothing may be."""
    reason = _reading.get()
    if reason:
        raise FileError(f"{reason} may not write {path}")
    if "\0" in str(path):
        raise FileError(f"cannot write {str(path)!r}: no name of a file has a NUL")
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot write {path}{what}: {error}; what was there before is whole") from error


# -- what is read for somebody else writes nothing ------------------------------------------------------------


@contextmanager
def reading_only(reason: str) -> Iterator[None]:
    """Refuse every write of this suite in this thread or task; `reason` says who may not."""
    token = _reading.set(reason)
    try:
        yield
    finally:
        _reading.reset(token)


def may_write() -> bool:
    """Whether writing is allowed here; what is kept for the next time alone is left out where it is not."""
    return not _reading.get()


def free_path(path: Path) -> Path:
    """The path, or where something is there the first of `name_2`, `name_3`, … where nothing is."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return found


def png_of(figure: Untyped, **options: Argument) -> bytes:
    """A matplotlib figure as the content of a PNG file; options as for `savefig`."""
    out = io.BytesIO()
    figure.savefig(out, format="png", **options)
    return out.getvalue()
