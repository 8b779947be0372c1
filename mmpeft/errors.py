"""Errors a user can act on: each says what was expected, what was received, where, and the remedy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Characters that a terminal obeys, or does not show: a name from a file may hold them."""
_LONGEST_WORD, _LONGEST_TEXT = 400, 20_000


class MMPEFTError(ValueError):
    """Base of every error this suite raises on purpose; its text is fit for a terminal, whatever names it holds."""

    def __str__(self) -> str:
        """Return the message as `shown` has it."""
        return shown(super().__str__())


class ConfigError(MMPEFTError):
    """An option, name or selector is wrong."""


class MissingExtraError(ConfigError, ModuleNotFoundError):
    """A library is not installed; the message says by which extra it is.

    It is a ModuleNotFoundError too, so that `pytest.importorskip` and `except ImportError` see what they look for.
    """

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


class StateError(ConfigError):
    """A call comes at the wrong time: before what it needs, or in a state in which it would do harm.

    It is a ConfigError too, which it was before it had a name.
    """


class SiteError(MMPEFTError):
    """A selector matches nothing, or a model has no known anatomy."""


class Refused(MMPEFTError):
    """A method cannot work at a site; the message carries the reason."""


class DataError(MMPEFTError):
    """A data set, file or label is not what a task needs."""


class FileError(MMPEFTError):
    """A file that the suite writes or reads is partial, foreign, tampered with, or made for something else."""


class AdapterFileError(FileError):
    """An adapter file is partial, foreign, tampered with, or made for another base."""


class CheckpointError(AdapterFileError):
    """A training run's checkpoint is partial, foreign, or of another method or task.

    It is an AdapterFileError too, which it was before it had a name.
    """


class DivergedError(MMPEFTError):
    """A loss, or something that trains, is NaN or infinite."""


class MMPEFTWarning(UserWarning):
    """Base of every warning this suite gives on purpose: nothing is wrong yet, and something soon may be."""


class FreshHeadWarning(MMPEFTWarning):
    """A head that was never trained stays frozen."""


class UnusedTensorsWarning(MMPEFTWarning):
    """A file was loaded without some of its tensors, which are no part of the adapter."""


class MovedBuffersWarning(MMPEFTWarning):
    """Buffers of the frozen base are no longer what they were."""


def expect(holds: bool, owner: object, name: str, value: object, wanted: str) -> None:
    """Raise ConfigError unless a value is as wanted: `expect(0 <= p < 1, "LoRA", "dropout", p, "in [0, 1)")`."""
    if not holds:
        said = owner if isinstance(owner, str) else type(owner).__name__
        raise ConfigError(f"{said}: {name} must be {wanted}, got {value!r}")


def renamed(old: str, new: str) -> None:
    """Warn that a name has another now; the old one goes on working."""
    warnings.warn(f"{old} is now {new}; the old name goes on working for a while", DeprecationWarning, stacklevel=3)


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Have every error of this suite say where it came up, below its message."""
    try:
        yield
    except MMPEFTError as error:
        error.add_note(note)
        raise


def shown(text: str) -> str:
    """Text that may hold names from a file, for people: control characters escaped, endless words and texts cut."""
    text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"
    text = _UNSEEN.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)
    return re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda match: f"{match[0][:200]}…{match[0][-100:]}", text)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    known = {str(n).lower(): str(n) for n in names}
    wanted = name[:_LONGEST_WORD].lower()
    close = get_close_matches(wanted, known, n=1, cutoff=0.4) or [n for n in known if wanted and wanted in n][:1]
    return f" Did you mean {known[close[0]]!r}?" if close else ""
