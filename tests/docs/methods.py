"""A page for each registered method: what the registry knows, its configuration, its docstring, where it works."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import yaml

from mmpeft.methods import METHODS
from tests.docs.backbones import marks

CONFIGS = Path(__file__).parents[2] / "configs" / "method"
KINDS = {
    "reparameterized": "updates of weights in a form with few parameters",
    "additive": "new modules, vectors or tokens beside the frozen weights",
    "selective": "some of the model's own parameters",
    "hybrid": "several of these at once",
    "efficient": "less memory or time, by parts that are left out",
}
HEAD = """# Methods

{count} methods. A method is a frozen dataclass: `mmpeft.attach(model, mmpeft.LoRA(rank=8))` in Python,
`--method "LoRA(rank=8)"` or `-c method/lora` on the command line. `mmpeft methods "*adapter*"` searches this list.

- **merges**: the tuning folds into the base weights, exactly; nothing is left to compute at inference.
- **identity**: before the first step the tuned model gives the base's output, bit for bit.

Which backbones a method works on is in the last table of its page, and for all of them in the [matrix](../matrix.md).
"""

OPTIONS = "    options: {members: false, heading: Definition, toc_label: Definition}"


def pages() -> dict[str, str | bytes]:
    """Path → text: an index, then one page a method, by kind and name."""
    found: dict[str, str | bytes] = {"methods/index.md": index()}
    works, configs = marks(), configurations()
    for kind in KINDS:
        for name in _of(kind):
            found[f"methods/{name.lower()}.md"] = page(name, configs[name], works)
    return found


def navigation() -> list[object]:
    """The index, then the pages by kind."""
    kinds = [{kind.capitalize(): [f"methods/{name.lower()}.md" for name in _of(kind)]} for kind in KINDS]
    return ["methods/index.md", *kinds]


def _of(kind: str) -> list[str]:
    return sorted((name for name, cls in METHODS.items() if cls.info.taxonomy == kind), key=str.lower)


def index() -> str:
    """The table of all methods."""
    lines = [HEAD.format(count=len(METHODS))]
    for kind, meaning in KINDS.items():
        lines += [f"## {kind.capitalize()}: {meaning}", "", "| method | merges | identity | |", "|---|---|---|---|"]
        for name in _of(kind):
            info, (said, *_) = METHODS[name].info, (METHODS[name].__doc__ or "").splitlines()
            flags = ("yes" if flag else "no" for flag in (info.mergeable, info.identity))
            lines.append(f"| [{name}]({name.lower()}.md) | " + " | ".join(flags) + f" | {_cell(said)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def configurations() -> dict[str, list[Path]]:
    """Method → the shipped configurations that set it."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(CONFIGS.glob("*.yaml")):
        method = yaml.safe_load(file.read_text("utf-8"))["method"]
        found[method["class_path"] if isinstance(method, dict) else method].append(file)
    return found


def page(name: str, configs: list[Path], works: dict[str, dict[str, dict[str, str]]]) -> str:
    """The page of one method."""
    cls = METHODS[name]
    info = cls.info
    facts = [info.taxonomy, "merges into the base" if info.mergeable else "does not merge"]
    facts.append("identity at the start" if info.identity else "changes the output at the start")
    facts += [f"[paper]({info.paper})"] if info.paper else []
    lines = [f"# {name}", "", " · ".join(facts), "", f"::: {cls.__module__}.{name}", OPTIONS, ""]
    if configs:
        lines += ["## Configuration", ""]
        for file in configs:
            lines += [f"`-c method/{file.stem}`", "", "```yaml", file.read_text("utf-8").strip(), "```", ""]
    return "\n".join([*lines, *_where(name, works)])


def _where(name: str, works: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """The table of backbones, from the matrix."""
    lines = ["## Backbones", "", "From the [matrix](../matrix.md), whose cells are tested.", ""]
    lines += ["| library | works | refused |", "|---|---|---|"]
    for library, rows in works.items():
        own = rows.get(name, {})
        good = [family for family, mark in own.items() if mark in "●○"]
        bad = [family for family, mark in own.items() if mark not in "●○"]
        lines.append(f"| {library} | {', '.join(good) or '–'} | {', '.join(bad) or '–'} |")
    return lines if any(rows.get(name) for rows in works.values()) else []
