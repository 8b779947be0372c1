"""What the fields of a method can hold: the types that they say, and numbers that are some."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from mmpeft.errors import ConfigError
from mmpeft.hosting.values import finite

TYPES: dict[str, tuple[type, ...]] = {
    "int": (Integral,),
    "float": (Real,),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "Selector": (str, Callable),  # type: ignore[dict-item]  # isinstance takes it
}
"""Annotations that are checked, and what they take; bool is no number."""


def check_fields(method: Any) -> None:
    """Raise ConfigError for a field of another type than its annotation says, or a number that is not finite.

    Annotations of more than that (methods, what else a field may be) are left to whoever uses them.
    """
    for field in fields(method):
        value = getattr(method, field.name)
        name, kind = f"{type(method).__name__}: {field.name}", str(field.type)
        items = {name: value}
        if kind.startswith("Literal["):
            options = ast.literal_eval(kind.removeprefix("Literal"))
            if value not in options:
                raise ConfigError(f"{name} must be one of {options}, got {value!r}")
        elif kind.startswith("Mapping[str, ") and "Any" not in kind:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} must be a mapping of selectors to values, got {value!r}")
            items = {f"{name} of {key!r}": item for key, item in value.items()}
            kind = kind.removeprefix("Mapping[str, ").removesuffix("]")
        elif kind.startswith("Sequence[") and kind.endswith("]"):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ConfigError(f"{name} must be a list, got {value!r}")
            items = {f"{name}[{i}]": item for i, item in enumerate(value)}
            kind = kind.removeprefix("Sequence[").removesuffix("]")
        known = set(kind.split(" | ")) <= set(TYPES)
        for label, item in items.items():
            if known and not any(_is(item, option) for option in kind.split(" | ")):
                raise ConfigError(f"{label} must be of type {kind}, got {item!r}")
            if isinstance(item, Real) and not finite(float(item) if not isinstance(item, int) else item):
                raise ConfigError(f"{label} must be a finite number, got {item!r}")


def _is(value: object, option: str) -> bool:
    return isinstance(value, TYPES[option]) and (option == "bool" or not isinstance(value, bool))
