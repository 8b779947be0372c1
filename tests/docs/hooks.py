"""What the site has beyond the files in docs/: pages of methods, backbones and names, and notebooks as pages.

mkdocs calls the functions here by their names (`hooks:` in mkdocs.yml).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for the `mkdocs` command, which does not look in the folder it is called in

from tests.docs import backbones, methods, names, notebooks  # noqa: E402

SECTIONS = {"methods": methods.pages, "backbones": backbones.pages, "api": names.pages, "notebooks": notebooks.pages}
"""Folder of the site → what makes its pages: `{path: text or bytes}`, in the order of the navigation."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages, so that the navigation can name them; let mkdocstrings see the package as it is installed."""
    names.sources()
    config.extra["made"] = {folder: make() for folder, make in SECTIONS.items()}
    config.nav = [_filled(entry, config.extra["made"]) for entry in config.nav or []]
    return config


def _filled(entry: Any, made: dict[str, dict[str, str | bytes]]) -> Any:
    """An entry of the navigation; one that names a section's folder becomes the list of its pages."""
    if not isinstance(entry, dict):
        return entry
    ((title, below),) = entry.items()
    if isinstance(below, list):
        return {title: [_filled(each, made) for each in below]}
    if below == "methods":
        return {title: methods.navigation()}
    return {title: list(filter(_is_page, made[below]))} if below in made else entry


def _is_page(path: str) -> bool:
    return path.endswith(".md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those in the folder."""
    for pages in config.extra["made"].values():
        for path, content in pages.items():
            files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Bars in the code of a table's cell: GitHub wants them escaped, Python-Markdown shows the backslash."""
    return re.sub(r"^\|.*\|$", lambda row: re.sub(r"`[^`]+`", _unescaped, row[0]), markdown, flags=re.MULTILINE)


def _unescaped(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")
