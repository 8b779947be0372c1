"""Pages of the public names: where each is defined, for mkdocstrings, which reads the docstring there."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

from mmpeft.methods import METHODS

ROOT = Path(__file__).parents[2]
DOMAINS = ("vision", "vla", "diffusion", "llm")
PACKAGES = {
    "mmpeft": "the core: attach, load, switch and combine",
    "mmpeft.vision": "timm and torchvision: backbones, tasks, data",
    "mmpeft.vla": "vision-language alignment, by open_clip: pairs, heads, tasks, data",
    "mmpeft.diffusion": "diffusers: pipelines, tasks, data",
    "mmpeft.llm": "transformers",
    "mmpeft.sites": "where a model can be tuned",
    "mmpeft.parts": "what hangs at a site",
    "mmpeft.methods": "what a method of your own builds on",
    "mmpeft.bank": "many tunings on one model",
    "mmpeft.formats.exchange": "files of other tools",
    "mmpeft.testing": "invariants of your own methods and models",
    "mmpeft.errors": "errors and warnings",
}


def sources() -> Path:
    """A folder with the source as an installation has it, domains inside `mmpeft/`: griffe follows no linked folders."""
    folder = ROOT / "build" / "documented"
    shutil.rmtree(folder, ignore_errors=True)
    for top in ("mmpeft", *DOMAINS):
        for file in (ROOT / top).rglob("*.py"):
            below = file.relative_to(ROOT / top)
            place = folder / "mmpeft" / ("" if top == "mmpeft" else top) / below
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    return folder


def pages() -> dict[str, str | bytes]:
    """Path → text, one page a package."""
    found: dict[str, str | bytes] = {"api/index.md": index()}
    for package in PACKAGES:
        found[f"api/{_slug(package)}.md"] = page(package)
    return found


def _slug(package: str) -> str:
    return package.rpartition(".")[2]


def index() -> str:
    """The table of packages."""
    rows = [f"| [`{package}`]({_slug(package)}.md) | {said} |" for package, said in PACKAGES.items()]
    return "\n".join(
        [
            "# API",
            "",
            "Public names by package; methods have [pages of their own](../methods/index.md).",
            "",
            "| package | |",
            "|---|---|",
            *rows,
        ]
    )


def public(package: str) -> list[tuple[str, str]]:
    """`(module, name)` of the classes and functions that a package offers; methods have pages of their own."""
    module = import_module(package)
    told = getattr(module, "__all__", None) or (dir(module) if hasattr(module, "__getattr__") else None)
    found = []
    for name in sorted(told or vars(module)):
        value = getattr(module, name)
        place = str(getattr(value, "__module__", ""))
        own = place.startswith("mmpeft") if told else place == package
        if own and getattr(value, "__name__", "") == name and name not in METHODS and name[0] != "_":
            found.append((place, name))
    return [each for each in found if package != "mmpeft" or not each[0].startswith("mmpeft.methods.")]


def page(package: str) -> str:
    """The page of one package."""
    lines = [f"# {package}", "", f"{PACKAGES[package].capitalize()}.", ""]
    lines += [f"::: {place}.{name}\n" for place, name in public(package)]
    return "\n".join(lines)
