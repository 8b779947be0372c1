"""Texts as people save them: their bytes read as Unicode, without byte-order marks and carriage returns."""

from __future__ import annotations

import codecs
from pathlib import Path

from mmpeft.errors import DataError

MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def cleaned(text: str) -> str:
    """A text without byte-order marks, with `\\n` for each end of a line, and nothing blank around it."""
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n").strip()


def unicode(data: bytes, where: str) -> str:
    """The text of a file's bytes: UTF-8, or the UTF-16 that its mark names.

    Raises:
        DataError: the bytes are neither.
    """
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    try:
        return data.removeprefix(mark).decode(MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read: {error}; save it as UTF-8") from error


def read_text(path: Path) -> str:
    """A text file, not yet cleaned.

    Raises:
        DataError: it cannot be read, or its encoding is unknown.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path} cannot be read: there is no such file")
        return unicode(path.read_bytes(), str(path))
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
