"""Errors a user can act on: each says what was expected, what was received, where, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MMPEFTError(ValueError):
    """Base of every error this suite raises on purpose."""


class ConfigError(MMPEFTError):
    """An option, name or selector is wrong."""


class SiteError(MMPEFTError):
    """A selector matches nothing, or a model has no known anatomy."""


class Refused(MMPEFTError):
    """A method cannot work at a site; the message carries the reason."""


class DataError(MMPEFTError):
    """A data set, file or label is not what a task needs."""


class AdapterFileError(MMPEFTError):
    """An adapter file is partial, foreign, tampered with, or made for another base."""


class MMPEFTWarning(UserWarning):
    """Base of every warning this suite gives on purpose: nothing is wrong yet, and something soon may be."""


class FreshHeadWarning(MMPEFTWarning):
    """A head that was never trained stays frozen."""


class MovedBuffersWarning(MMPEFTWarning):
    """Buffers of the frozen base are no longer what they were."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    known = {str(n).lower(): str(n) for n in names}
    wanted = name.lower()
    close = get_close_matches(wanted, known, n=1, cutoff=0.4) or [n for n in known if wanted and wanted in n][:1]
    return f" Did you mean {known[close[0]]!r}?" if close else ""
