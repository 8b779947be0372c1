"""Names of a package that are loaded when first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names live in the modules that the table says, relative to it."""

    def get(name: str) -> Any:
        if name not in table:
            from mmpeft.errors import nearest

            hint = "" if name.startswith("_") else nearest(name, table)
            raise AttributeError(f"module {package!r} has no attribute {name!r}.{hint}")
        return getattr(import_module(f"{package}.{table[name]}"), name)

    return get, lambda: sorted(table)
