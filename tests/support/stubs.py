"""The `.pyi` files of packages whose names are loaded when first used, so that editors and type checkers see types.

`python -m tests.support.stubs` writes them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from mmpeft._lazy import Exports

ROOT = Path(__file__).parents[2]
DOMAINS = ("vision", "vla", "diffusion", "llm")
METHODS = "mmpeft.methods"
CONSTANTS = {
    "COMMANDS": "dict[str, tuple[str, str]]",
    "DATA": "dict[str, str]",
    "EXPORTS": "dict[str, str]",
    "PARTS": "dict[str, str]",
    "PIPELINE_EXPORTS": "dict[str, str]",
    "TASKS": "dict[str, str]",
    "__version__": "str",
}


def packages() -> list[str]:
    """Every package that loads names when first used, and that of the methods, which are found by looking."""
    folders = [path.parent.relative_to(ROOT) for top in ("mmpeft", *DOMAINS) for path in (ROOT / top).rglob("*.py")]
    lazy = [folder for folder in folders if "_lazy" in (ROOT / folder / "__init__.py").read_text("utf-8")]
    names = {".".join(folder.parts) for folder in lazy}
    return sorted({METHODS, *(name if name.startswith("mmpeft") else f"mmpeft.{name}" for name in names)})


def path_of(package: str) -> Path:
    """Where a package's stub is."""
    parts = package.split(".")
    return ROOT.joinpath(*(parts[1:] if len(parts) > 1 and parts[1] in DOMAINS else parts), "__init__.pyi")


def names_of(module: ModuleType) -> list[str]:
    """The public names of a package."""
    return sorted(module.__all__ if module.__name__ == METHODS else dir(module))


def text(package: str) -> str:
    """What a package's stub should say."""
    module = import_module(package)
    own = [name for name in names_of(module) if name in vars(module) and name in CONSTANTS]
    imports = sorted(
        (_home(module, name), (not name.isupper(), name[0].islower()), name.lower(), name)
        for name in names_of(module)
        if name not in own
    )
    lines = [f"from {home} import {name} as {name}{_elsewhere(home, name)}" for home, *_, name in imports]
    lines += ["", *(f"{name}: {CONSTANTS[name]}" for name in own)] if own else []
    said = f"Types of the names of {package}; written by `python -m tests.support.stubs`."
    return "\n".join([f'"""{said}"""', "", *lines]) + "\n"


def _home(module: ModuleType, name: str) -> str:
    """The module that defines a name: a class or a function knows, of anything else the table says."""
    value = getattr(module, name)
    if isinstance(value, ModuleType):
        return module.__name__
    if getattr(value, "__name__", None) == name:
        return str(value.__module__)
    if name == "METHODS":
        return f"{METHODS}.base"
    lazy = module.__getattr__.__self__
    assert isinstance(lazy, Exports)
    return lazy.all_places()[name].partition(":")[0]


def _elsewhere(home: str, name: str) -> str:
    """What silences mypy in this repository, where domains lie beside `mmpeft/`."""
    return "  # type: ignore[attr-defined, unused-ignore]" if home == "mmpeft" and name in DOMAINS else ""


if __name__ == "__main__":
    for each in packages():
        path_of(each).write_text(text(each), "utf-8")
