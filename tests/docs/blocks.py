"""The code blocks of a Markdown page, and the comments that say how a test treats them.

A comment on the line before a block:

    <!-- no run: hub -->          a Python block that is only compiled, for one of the REASONS
    <!-- run -->                  commands that are run, not only parsed
    <!-- run: --trainer.max_steps 1 -->   the same, with options added to each command that trains
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
REASONS = {
    "hub": "weights or data come from a hub",
    "gpu": "a GPU is needed",
    "minutes": "it takes minutes",
}
LANGUAGES = {"python", "bash", "yaml", "toml", "json", "text"}
_BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n)?^( *)```(\w*)[^\n]*\n(.*?)^\2```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block, and what is said before it."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def skipped(self) -> str:
        """The reason for which a Python block is not run; empty for none."""
        return self.mark.removeprefix("no run:").strip() if self.mark.startswith("no run") else ""

    @property
    def runs(self) -> bool:
        """Whether commands are run."""
        return self.mark == "run" or self.mark.startswith("run:")

    @property
    def added(self) -> list[str]:
        """What is added to a command that trains."""
        return shlex.split(self.mark.removeprefix("run:")) if self.mark.startswith("run:") else []

    def commands(self) -> Iterator[list[str]]:
        """The words of each command, comments and continued lines apart."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def pages() -> list[Path]:
    """README and every page in docs/ that is written by hand or by a command."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start(4)) + 1,
            found[3],
            textwrap.dedent(found[4]),
            found[1] or "",
        )
        for found in _BLOCK.finditer(text)
    ]
