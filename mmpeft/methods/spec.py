"""Methods as plain data: what an adapter file holds instead of code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from mmpeft.errors import ConfigError, nearest
from mmpeft.methods.base import METHODS, Method
from mmpeft.methods.compose import Frozen, Restricted, Union
from mmpeft.methods.gated import Gated
from mmpeft.methods.shared.statistics import BatchStatistics
from mmpeft.types import Facts, Json, Kwargs, Leaf


def by_name() -> dict[str, type[Method]]:
    """Every class that a file may name: the registered methods, and those that are made of methods."""
    unlisted = (Frozen, Union, Restricted, Gated, BatchStatistics)
    return {**METHODS, **{cls.__name__: cls for cls in unlisted}}


def to_spec(method: Method) -> Json:
    """A method as JSON-ready data: its class name and every field.

    Raises:
        ConfigError: a predicate instead of a selector string; code is not written to files.
    """
    return {"name": type(method).__name__, **{f.name: _plain(method, f.name) for f in fields(method)}}


def _plain(method: Method, name: str) -> object:
    value = getattr(method, name)
    if callable(value):
        raise ConfigError(
            f"{type(method).__name__}.{name} is a predicate, which no file can hold; write it as a selector string"
        )
    if isinstance(value, Method):
        return to_spec(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return [to_spec(item) if isinstance(item, Method) else item for item in value]
    return value


def from_spec(spec: Facts) -> Method:
    """The method that `to_spec` described.

    Raises:
        ConfigError: an unknown method or field.
    """
    classes = by_name()
    name = spec.get("name")
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(
            f"unknown method {name!r}; known: {', '.join(sorted(classes))}.{nearest(str(name), classes)} A method of "
            "somebody else's is known once the module that registers it is imported"
        )
    cls = classes[name]
    known = {f.name for f in fields(cls)}
    known |= {"target_modules"} if "at" in known else set()
    values: Kwargs = {key: value for key, value in spec.items() if key != "name"}
    for key in values:
        if key not in known:
            raise ConfigError(f"{name} has no field {key!r}; fields: {', '.join(sorted(known))}.{nearest(key, known)}")
    return cls(**{key: _built(value) for key, value in values.items()})


def _built(value: object) -> Leaf:
    """A field's value, methods inside it built."""
    if isinstance(value, list):
        return [_built(item) for item in value]
    return from_spec(value) if isinstance(value, Mapping) and "name" in value else value
