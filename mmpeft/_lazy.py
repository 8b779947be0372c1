"""Names of a package that are loaded when first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

from mmpeft._extras import needed_by


class Exports:
    """The public names of one package, and the place of each: `module:name`, or `module:` for a module itself."""

    def __init__(
        self,
        package: str,
        table: Mapping[str, str],
        modules: Collection[str],
        more: Callable[[], Mapping[str, str]],
    ) -> None:
        self.package, self.more = package, more
        self.places = {name: self._whole(name, place) for name, place in table.items()}
        self.places |= {name: f"{package}.{name}:" for name in modules}

    def get(self, name: str) -> Any:
        """The package's `__getattr__`."""
        place = self.places.get(name)
        if place is None and not name.startswith("_"):
            place = self.all_places().get(name)
        if place is None:
            raise AttributeError(f"module {self.package!r} has no attribute {name!r}{self._hint(name)}", name=name)
        module, _, attribute = place.partition(":")
        with needed_by(f"{self.package}.{name}", module):
            found = import_module(module)
        return getattr(found, attribute) if attribute else found

    def names(self) -> list[str]:
        """The package's `__dir__`: the names here, and constants of its own."""
        own = (
            name
            for name in vars(sys.modules[self.package])
            if (name.isupper() and name[0] != "_") or name == "__version__"
        )
        return sorted({*own, *self.all_places()})

    def all_places(self) -> dict[str, str]:
        """Every name's place, with those that are found by looking."""
        return self.places | {name: self._whole(name, place) for name, place in self.more().items()}

    def _whole(self, name: str, place: str) -> str:
        return place if ":" in place else f"{self.package}.{place}:{name}"

    def _hint(self, name: str) -> str:
        if name.startswith("_"):  # asked for by Python and its tools, not by people
            return ""
        from mmpeft.errors import nearest

        return f".{nearest(name, self.names())}"


def exports(
    package: str,
    table: Mapping[str, str],
    modules: Collection[str] = (),
    more: Callable[[], Mapping[str, str]] = dict,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its name.
        table: name -> where it lives: a module relative to the package, or `module:name` in full.
        modules: sub-modules that need no import of their own.
        more: further names like those of `table`, asked for once something else is not found.
    """
    made = Exports(package, table, modules, more)
    return made.get, made.names
