"""Models by name, for a look at their structure: which library knows a name, and how it is built.

A domain registers its library without importing it. Weights are never read: where a model can be tuned does not depend
on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from mmpeft._extras import remedy
from mmpeft.errors import ConfigError, MissingExtraError, nearest
from mmpeft.sites.site import load_domains
from mmpeft.types import AnyFunc, Batch


@dataclass(frozen=True)
class Library:
    """How to build the models of a library by name: `home` is the module that has `knows`, `names` and `build`."""

    name: str
    home: str
    package: str = ""
    """What must be installed; by default the library's own name."""
    domain: str = ""
    """The extra of this suite that installs it."""

    def knows(self, name: str) -> bool:
        """Whether a name without a prefix is one of this library's."""
        return self.is_installed and bool(self._call("knows")(name))

    def names(self) -> list[str]:
        """Every name of its registry."""
        return list(self._call("names")()) if self.is_installed else []

    def build(self, name: str) -> nn.Module | tuple[nn.Module, Batch]:
        """The model on random weights, alone or with an example; a ConfigError where there is none of that name."""
        if not self.is_installed:
            raise MissingExtraError(
                f"{self.name}:{name} needs {self.name}: {remedy(self.package or self.name, self.domain)}"
            )
        built: nn.Module | tuple[nn.Module, Batch] = self._call("build")(name)
        return built

    @property
    def is_installed(self) -> bool:
        return find_spec(self.package or self.name) is not None

    def _call(self, function: str) -> AnyFunc:
        found: AnyFunc = getattr(import_module(self.home), function)
        return found


_LIBRARIES: dict[str, Library] = {"python": Library("python", "mmpeft.sites.called", package="torch")}


def add_library(library: Library) -> None:
    """Have `find_named` ask a library; its name is the prefix."""
    _LIBRARIES[library.name] = library


@dataclass(frozen=True)
class Named:
    """A model that a library knows by name."""

    library: Library
    name: str

    def build(self, *, empty: bool = True) -> tuple[nn.Module, Batch]:
        """The model in evaluation mode: `empty`, without memory for its weights, or on random ones.

        With it comes an example of its inputs, where whoever builds it gives one, or None.
        """
        with torch.device("meta" if empty else "cpu"):
            built = self.library.build(self.name)
        model, example = built if isinstance(built, tuple) else (built, None)
        return model.eval(), example


def libraries() -> list[Library]:
    """The libraries that are asked for names."""
    load_domains()
    return list(_LIBRARIES.values())


def find_named(text: str) -> Named:
    """The library that knows a name, which a prefix such as `timm:` decides.

    Raises:
        ConfigError: none knows it (the nearest names are said), or more than one.
    """
    load_domains()
    prefix, colon, name = text.partition(":")
    if colon and prefix in _LIBRARIES:
        return Named(_LIBRARIES[prefix], name)
    found = [library for _, library in sorted(_LIBRARIES.items()) if library.knows(text)]
    if len(found) > 1:
        choices = " or ".join(f"{library.name}:{text}" for library in found)
        raise ConfigError(f"{text!r} is a name of {' and of '.join(lib.name for lib in found)}: write {choices}")
    if not found:
        raise ConfigError(f"no library knows a model {text!r}.{_near(text)} {WAYS.format(', '.join(_LIBRARIES))}")
    return Named(found[0], text)


WAYS = (
    "Expected a name of timm or open_clip, a type of model of transformers, a class of diffusers, a folder with a "
    "configuration, embedded:<name>, or a call of your own as module:function; a prefix says whose it is: {}"
)


def _near(text: str) -> str:
    """The nearest name of each library that has one, the best first."""
    names: dict[str, str] = {}
    for library in _LIBRARIES.values():
        for name in library.names():
            names.setdefault(name, library.name)
    return nearest(text, names)
