"""Every method of the suite, found by looking: a new file in a taxonomy folder is a new method."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mmpeft.methods.base import METHODS, Method, MethodInfo, Sited, SiteMethod, list_methods, register
from mmpeft.methods.compose import Frozen, Restricted, Union
from mmpeft.methods.needs import Need, Refusal, at_site
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.shared.statistics import BatchStatistics
from mmpeft.methods.shared.tensors import TensorMethod

for _folder in ("additive", "selective", "reparameterized", "hybrid", "efficient"):
    _package = import_module(f"mmpeft.methods.{_folder}")
    for _module in iter_modules(_package.__path__):
        import_module(f"{_package.__name__}.{_module.name}")

__all__ = ["METHODS", "BatchStatistics", "Frozen", "Method", "Restricted", "Union", "list_methods", *METHODS]
__all__ += ["Need", "Placed", "Refusal", "Traits", "at_site"]
__all__ += ["MethodInfo", "SiteMethod", "Sited", "TensorMethod", "register"]  # what a method of one's own builds on


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return METHODS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
