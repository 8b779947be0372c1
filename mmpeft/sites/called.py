"""Models that a call of the user's own builds, named as `module:function`."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.types import AnyFunc, Batch

FORM = "module:function, a call without arguments that returns a model, or a model and an example of its inputs"


def knows(name: str) -> bool:
    """Whether there is such a module; the current folder is looked into too."""
    module, colon, function = name.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        return False
    _look_here()
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def names() -> list[str]:
    """None that could be listed."""
    return []


def build(name: str) -> nn.Module | tuple[nn.Module, Batch]:
    """What the call returns."""
    _look_here()
    module, _, function = name.partition(":")
    try:
        call: AnyFunc = getattr(import_module(module), function)
        inspect.signature(call).bind()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{name!r}: {error}; expected {FORM}") from error
    built: nn.Module | tuple[nn.Module, Batch] = call()
    model = built[0] if isinstance(built, tuple) and len(built) == 2 else built
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}; expected {FORM}")
    return built


def _look_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
