"""A page for each library, an entry for each backbone family, from docs/matrix.md and docs/zoo.md."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
Marks = dict[str, dict[str, dict[str, str]]]
HEAD = """# Backbones

A backbone needs no description: [any model](../any_model.md) is tuned by watching one forward pass. These pages list
what was tried, one page for each library:

{links}

Two kinds of entries:

- **Families in the matrix** are tiny models, on which every method is held to every invariant ([matrix](../matrix.md)).
- **Models in the zoo** are all architectures of the library, small or shallow, tried with eight methods
  ([zoo](../zoo.md)).
"""

PASSED = "Every method that is listed as working passes the invariants of [`mmpeft.testing`](../api/testing.md)."


def pages() -> dict[str, str | bytes]:
    """Path → text: an index, then one page a library."""
    found: dict[str, str | bytes] = {}
    titles = list(marks())
    links = [f"- [{title}]({_slug(title)}.md)" for title in titles]
    found["backbones/index.md"] = HEAD.format(links="\n".join(links))
    for title in titles:
        found[f"backbones/{_slug(title)}.md"] = page(title)
    return found


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


@cache
def _sections(file: str) -> dict[str, str]:
    """A page's sections by title."""
    parts = re.split(r"^## (.+)$", (DOCS / file).read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def marks() -> Marks:
    """Library → method → family → what the matrix says: ●, ○, or the number of a reason."""
    found: Marks = {}
    for title, text in _sections("matrix.md").items():
        rows = [_cells(line) for line in text.splitlines() if line.startswith("| ")]
        if rows and rows[0][0] == "method":
            head, *lines = rows
            found[title] = {line[0]: dict(zip(head[1:], line[1:])) for line in lines}
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def _reasons(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))


def page(title: str) -> str:
    """The page of one library."""
    rows = marks()[title]
    reasons = _reasons(_sections("matrix.md")["Refusals"])
    families = list(dict.fromkeys(family for own in rows.values() for family in own))
    lines = [f"# {title}", "", PASSED, ""]
    for family in families:
        own = {method: line[family] for method, line in rows.items() if family in line}
        lines += [f"## {family}", "", "| | methods |", "|---|---|"]
        for mark, meaning in (("●", "work and merge"), ("○", "work, do not merge")):
            lines.append(f"| {meaning} | {', '.join(m for m, found in own.items() if found == mark) or '–'} |")
        refused: dict[str, list[str]] = {}
        for method, mark in own.items():
            if mark not in "●○":
                refused.setdefault(reasons[mark], []).append(method)
        lines += [f"| refused: {_cell(reason)} | {', '.join(names)} |" for reason, names in refused.items()]
        lines.append("")
    zoo = _sections("zoo.md").get(title)
    if zoo:
        lines += ["## All models of the library", "", "How to read this table: [zoo](../zoo.md).", "", *_zoo(zoo)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of an error message as a table's cell."""
    return re.sub(r"([*_<>{}\[\]])", r"\\\1", text).replace("|", "\\|")


def _zoo(text: str) -> list[str]:
    """A library's part of the zoo, with the notes that it refers to."""
    notes = _reasons(_sections("zoo.md")["Notes"])
    rows = [" ".join(_cells(line)[3:]) for line in text.splitlines() if line.startswith("| ")]
    used = {number for row in rows for number in re.findall(r"\b\d+\b", row)}
    said = [f"- **{number}**: {_cell(note)}" for number, note in notes.items() if number in used]
    return [text.strip(), "", "Notes:", "", *said, ""]
