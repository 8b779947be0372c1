"""The arrows of the design that import-linter cannot see: domains live outside the folder `mmpeft/`."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOMAINS = ("vision", "vla", "diffusion", "llm")


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level}


@pytest.mark.parametrize("folder", ["mmpeft", *DOMAINS])
def test_domains_import_the_core_and_never_each_other(folder: str) -> None:
    foreign = {f"mmpeft.{d}" for d in DOMAINS if d != folder} | set(DOMAINS)
    for path in (ROOT / folder).rglob("*.py"):
        wrong = {i for i in _imports(path) for f in foreign if i == f or i.startswith(f + ".")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_importing_the_package_loads_no_library() -> None:
    names = "('torch', 'timm', 'lightning', 'numpy')"
    code = f"import sys, mmpeft, mmpeft.cli; print([m for m in {names} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_core_and_the_domains_load_no_backbone_library() -> None:
    """Importing all of them loads none, so importing one of them loads none."""
    code = (
        "import sys, mmpeft; mmpeft.LoRA; mmpeft.attach; mmpeft.load;"
        "import mmpeft.vision, mmpeft.vla, mmpeft.diffusion, mmpeft.llm;"
        "libraries = 'timm', 'torchvision', 'open_clip', 'diffusers', 'transformers', 'lightning';"
        "print([m for m in libraries if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def _modules() -> dict[str, Path]:
    """Every module of the suite, by the name under which it installs."""
    found = {}
    for folder in ("mmpeft", *DOMAINS):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "mmpeft" else ("mmpeft", *parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def _imported(path: Path, known: set[str]) -> set[str]:
    """Modules of the suite that a file imports anywhere, but for what only a type checker reads."""
    tree = ast.parse(path.read_text("utf-8"))
    unread = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return found & known


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions count: what two files need of each other is one file's, or is handed over."""
    modules = _modules()
    graph = {name: _imported(path, set(modules)) - {name, "mmpeft"} for name, path in modules.items()}
    with_packages = {name: {i for i in own if not name.startswith(f"{i}.")} for name, own in graph.items()}
    list(TopologicalSorter(with_packages).static_order())  # raises CycleError, which names the circle
