"""Pages of the public names: where each is defined, for mkdocstrings, which reads the docstring there.

Nothing is imported but the registry of methods: libraries take longer to load than the site takes to build.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from mmpeft.methods import METHODS

ROOT = Path(__file__).parents[2]
DOMAINS = ("vision", "vla", "diffusion", "llm")
CONSTANTS = ("COMMANDS", "DATA", "FORMATS", "INVARIANTS", "METHODS", "PARTS", "PRESETS", "ROLES", "TASKS")
PACKAGES = {
    "mmpeft": "The core: attach, load, switch and combine",
    "mmpeft.vision": "Backbones, tasks and data for timm and torchvision",
    "mmpeft.vla": "Vision-language alignment with open_clip: pairs, heads, tasks and data",
    "mmpeft.diffusion": "Pipelines, tasks and data for diffusers",
    "mmpeft.llm": "Language models of transformers",
    "mmpeft.sites": "Where a model can be tuned",
    "mmpeft.parts": "Trainable modules that are placed at sites",
    "mmpeft.methods": "Base classes for methods of your own",
    "mmpeft.bank": "Many tunings on one model",
    "mmpeft.formats.exchange": "Files of other tools",
    "mmpeft.testing": "Invariants for your own methods and models",
    "mmpeft.errors": "Errors and warnings",
}
OPTIONS = {"Tuning": "    options: {inherited_members: true}\n"}
INDEX = """# API

Public names by package; methods have [pages of their own](../methods/index.md).

| package | |
|---|---|"""


def sources() -> Path:
    """A folder with the source as an installation has it, domains inside `mmpeft/`: griffe follows no linked folder."""
    folder = ROOT / "build" / "documented"
    shutil.rmtree(folder, ignore_errors=True)
    for top in ("mmpeft", *DOMAINS):
        for file in (ROOT / top).rglob("*.py"):
            place = folder / "mmpeft" / ("" if top == "mmpeft" else top) / file.relative_to(ROOT / top)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    return folder


def pages() -> dict[str, str | bytes]:
    """Path → text, one page a package."""
    rows = [f"| [`{package}`]({_slug(package)}.md) | {said} |" for package, said in PACKAGES.items()]
    found: dict[str, str | bytes] = {"api/index.md": "\n".join([INDEX, *rows])}
    return found | {f"api/{_slug(package)}.md": page(package) for package in PACKAGES}


def _slug(package: str) -> str:
    return package.rpartition(".")[2]


def page(package: str) -> str:
    """The page of one package."""
    lines = [f"# {package}", "", f"{PACKAGES[package]}.", ""]
    return "\n".join([*lines, *(f"::: {place}.{name}\n{OPTIONS.get(name, '')}" for place, name in public(package))])


def public(package: str) -> list[tuple[str, str]]:
    """`(module, name)` of what a package offers, as its stub or source imports and defines it; no methods."""
    told = set[str]()
    found: list[tuple[str, str]] = []
    for node in ast.parse(_file(package).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, each.name) for each in node.names]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.append((package, node.name))
        elif isinstance(node, ast.Assign | ast.AugAssign) and "__all__" in ast.unparse(node):
            told |= {each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)}
    elsewhere = {*METHODS, *CONSTANTS}
    if package == "mmpeft":
        elsewhere |= {name for _, name in public("mmpeft.methods")}
    own = {
        (place, name)
        for place, name in found
        if (name in told or not told) and name[0] != "_" and name not in elsewhere
        if place.startswith("mmpeft.") and f"{place}.{name}" not in PACKAGES
    }
    own = {(place, name) for place, name in own if place != "mmpeft.errors" or package == "mmpeft.errors"}
    return sorted(own, key=lambda each: each[1].lower())


def _file(package: str) -> Path:
    """The stub of a package, or its source."""
    parts = package.split(".")
    folder = ROOT.joinpath(*(parts[1:] if parts[1:2] and parts[1] in DOMAINS else parts))
    places = (folder / "__init__.pyi", folder / "__init__.py", folder.with_suffix(".py"))
    return next(place for place in places if place.is_file())
