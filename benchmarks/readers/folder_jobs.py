"""What the programs that read and write folders are asked, and how they answer; imports nothing that they may lack.

A program is called as `python PROGRAM BASE JOBS`: BASE is a transformers folder, JOBS a JSON list of `verb` (`read` or
`write`), `folder`, `out` and `kind`. Each `out` gets `logits.base` and `logits.tuned` for the words 1 to 8, or the
program's refusal in a text file of that name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path


def answer(one: Callable[[str, Path, Path, Path, str], None]) -> None:
    """Answer every job of the command line by `one(verb, base, folder, out, kind)`."""
    base = Path(sys.argv[1])
    for job in json.loads(Path(sys.argv[2]).read_text()):
        out = Path(job["out"])
        try:
            one(job["verb"], base, Path(job["folder"]), out, job["kind"])
        except Exception as error:
            out.with_suffix(".txt").write_text(f"{type(error).__name__} {error}".replace("\n", " "))
