"""Sites as JSON: an adapter holds those of the model it was made for, so that loading it needs no watch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from mmpeft.sites.site import ROLES, Site
from mmpeft.types import Json, Leaf

LEFT_OUT = ("connect",)
"""How learned keys enter is noted anew by the domain."""


def to_json(site: Site) -> Json:
    """What of a site differs from its defaults."""
    found = {}
    for field in fields(Site):
        value = getattr(site, field.name)
        if field.name not in LEFT_OUT and value != field.default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def from_json(given: object) -> Site:
    """A site from what `to_json` made of it.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"a site is a mapping, got {type(given).__name__}")
    known = {field.name: field for field in fields(Site) if field.name not in LEFT_OUT}
    extra = sorted(set(given) - set(known))
    missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
    if extra or missing:
        raise ValueError(f"a site has no field {extra[0]!r}" if extra else f"a site lacks {missing[0]!r}")
    site = Site(**{name: _checked(known[name], value) for name, value in given.items()})
    if site.role not in ROLES:
        raise ValueError(f"a site has the unknown role {site.role!r}")
    return site


def _checked(field: Field[Any], value: Leaf) -> Leaf:
    if field.name == "rows":
        if isinstance(value, list) and len(value) in (2, 3) and all(type(v) is int and v >= 0 for v in value):
            return tuple(value)
        raise ValueError(f"rows of a site are two or three numbers, got {value!r}")
    expected = str if field.default is MISSING else type(field.default)
    if type(value) is not expected:
        raise ValueError(f"{field.name} of a site is {expected.__name__}, got {value!r}")
    return value
