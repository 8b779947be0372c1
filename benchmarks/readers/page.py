"""The table of readers as a page: for each pipeline and format, methods by programs."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.readers.programs import PROGRAMS, Program

START, END = "<!-- diffusion: python -m benchmarks.readers -->", "<!-- end of diffusion -->"
LEGEND = """\
A number is the relative error of what the file changes, `‖ΔW read − ΔW trained‖ / ‖ΔW trained‖` over all tensors.
*nothing* is an error of 1 without a word, *partly* says how many tensors were left out, *refused* is an error of that
program. Not tried are programs whose own tables have the width of the published model written into them, and A1111's
second text encoder. The models are the published ones' shapes a few features wide, with random weights. SD.Next is
its own loader; files that it does not take it hands to diffusers. LyCORIS is given SDXL as sd-scripts builds it."""


@dataclass(frozen=True)
class Row:
    """What one reader makes of one file."""

    program: str
    kind: str
    format: str
    method: str
    result: str


def version_of(program: Program, sources: Path) -> str:
    """The installed package's version, or a checkout's commit and its day."""
    if program.package:
        return version(program.package)
    folder = sources / program.folder
    if (folder / "VERSION.txt").exists():
        return (folder / "VERSION.txt").read_text().strip()
    command = ["git", "-C", str(folder), "log", "-1", "--format=%h of %cd", "--date=short"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def page(rows: Sequence[Row], versions: dict[str, str], unwritten: set[tuple[str, str, str]]) -> str:
    """The whole section."""
    programs = [name for name in PROGRAMS if name in versions]
    lines = [START, "", f"Run on {datetime.date.today()} with the loaders of"]
    said = [f"{PROGRAMS[name].name} {versions[name]}" for name in programs]
    lines += [", ".join(said) + ".", "", LEGEND, ""]
    cells = {(row.kind, row.format, row.method, row.program): row.result for row in rows}
    for kind in dict.fromkeys(row.kind for row in rows):
        for format in dict.fromkeys(row.format for row in rows if row.kind == kind):
            own = [n for n in programs if kind in PROGRAMS[n].kinds and format in PROGRAMS[n].formats]
            methods = list(dict.fromkeys(row.method for row in rows if (row.kind, row.format) == (kind, format)))
            lines += [f"### {kind}, `{format}`", ""]
            lines += ["| |" + "|".join(PROGRAMS[name].name for name in own) + "|", "|---|" + "---|" * len(own)]
            for method in methods:
                found = [cells.get((kind, format, method, name), "–") for name in own]
                lines.append(f"|{_named(method)}|" + "|".join(map(_cell, found)) + "|")
            none = sorted(m for k, f, m in unwritten if (k, f) == (kind, format))
            lines += ["", f"Not written: {', '.join(map(_named, none))}." if none else "", ""]
    return "\n".join([*lines, END]) + "\n"


def _named(method: str) -> str:
    first, _, form = method.partition("DoRA, ")
    return f'DoRA, `dora="{form}"`' if form and not first else method


def _cell(result: str) -> str:
    return "refused" if result.startswith("refused") else "not tried" if result.startswith("not tried") else result


def put(text: str, file: Path) -> None:
    """Put a section into a page between its marks, which are its own first and last line; the rest stays."""
    lines = text.splitlines()
    before = file.read_text("utf-8") if file.exists() else ""
    if lines[0] in before:
        head, _, rest = before.partition(lines[0])
        text = head + text + rest.partition(f"{lines[-1]}\n")[2]
    else:
        text = before + "\n" + text
    file.write_text(text, "utf-8")
