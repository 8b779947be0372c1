"""`mmpeft models`, `mmpeft data`, `mmpeft methods`: what a configuration may name."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmpeft._arguments import own_arguments
from mmpeft.errors import ConfigError, nearest
from mmpeft.run.domains import table

WHOLE = 10_000
"""Columns of what is written into a file or a pipe: lines are never cut there."""


def models(argv: Sequence[str] | None = None) -> int:
    """`mmpeft models`: tasks for --model, and names for their backbones."""
    parser = argparse.ArgumentParser(
        "mmpeft models",
        description="Tasks for --model, and the backbones that ship; with PATTERN the names that the libraries know.",
    )
    parser.add_argument("pattern", nargs="?", help="a wildcard, such as 'vit_*' or 'open_clip:*B-32*'")
    pattern = parser.parse_args(own_arguments(argv)).pattern
    if pattern:
        return _names(pattern)
    _show("--model", ("task", "extra", "what it does"), _classes("TASKS"))
    weights = Path(str(files("mmpeft"))) / "embedded" / "weights"
    shipped = sorted({path.stem for path in weights.glob("*.json")} | {p.name for p in weights.iterdir() if p.is_dir()})
    _show("backbones and pipelines that ship", ("name",), [(f"embedded:{name}",) for name in shipped])
    print("`mmpeft models 'vit_*'` lists what timm, torchvision, open_clip, diffusers and transformers know.")
    return 0


def data(argv: Sequence[str] | None = None) -> int:
    """`mmpeft data`: data modules for --data."""
    parser = argparse.ArgumentParser("mmpeft data", description="Data modules for --data.")
    parser.parse_args(own_arguments(argv))
    _show("--data", ("data", "extra", "what it reads"), _classes("DATA"))
    print("`mmpeft fit --data.help NAME` lists the options of one; docs/extend/data.md writes one of your own.")
    return 0


def methods(argv: Sequence[str] | None = None) -> int:
    """`mmpeft methods`: the registered methods."""
    parser = argparse.ArgumentParser("mmpeft methods", description="Methods for --method.")
    parser.add_argument("pattern", nargs="*", default=["*"], help="wildcards, such as '*lora*'; default: all")
    patterns = parser.parse_args(own_arguments(argv)).pattern or ["*"]
    from mmpeft.methods import METHODS, list_methods

    names = sorted({name for pattern in patterns for name in list_methods(pattern)})
    if not names:
        raise ConfigError(f"no method matches {' '.join(patterns)!r}.{nearest(patterns[0].strip('*'), METHODS)}")
    rows = []
    for name in names:
        info = METHODS[name].info
        said = (METHODS[name].__doc__ or "").strip().splitlines()[0]
        flags = ("yes" if flag else "no" for flag in (info.mergeable, info.identity))
        rows.append((name, said, info.taxonomy, *flags, info.paper))
    _show("--method", ("method", "what it trains", "kind", "mergeable", "identity at init", "paper"), rows)
    return 0


def _show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; lines with tabs between where the output goes into a pipe or a file."""
    if not sys.stdout.isatty():
        for row in rows:
            print(*row, sep="\t")
        return
    found = Table(*columns, title=title, title_justify="left")
    for row in rows:
        found.add_row(*row)
    Console().print(found)


def _classes(kind: str) -> list[tuple[str, str, str]]:
    """Name, domain and first sentence of each class in a table of the domains; no library is imported."""
    return [(name, domain, _summary(target)) for name, (domain, target) in sorted(table(kind).items())]


def _summary(target: str) -> str:
    """The first line of a class's docstring, read from its source."""
    module, _, name = target.partition(":")
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""


def _names(pattern: str) -> int:
    """Print names that libraries know, each with its library."""
    from mmpeft.sites.named import libraries

    found: Mapping[str, Sequence[str]] = {library.name: library.names() for library in libraries()}
    library, _, rest = pattern.partition(":") if ":" in pattern else ("*", "", pattern)
    rest = rest if set(rest) & set("*?[") else f"*{rest}*"
    chosen = {name: own for name, own in found.items() if fnmatchcase(name, library)}
    lines = [f"{name}:{one}" for name, own in chosen.items() for one in own if fnmatchcase(one, rest)]
    if not lines:
        every = [one for own in found.values() for one in own]
        raise ConfigError(f"no library knows a model like {pattern!r}.{nearest(rest.strip('*'), every)}")
    print(*lines, sep="\n")
    return 0
