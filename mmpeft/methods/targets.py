"""`target_modules=`, PEFT's word for where a method goes, beside `at=`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from mmpeft.errors import ConfigError

ALL_LINEAR = "all-linear"


def selector_of(target_modules: str | Sequence[str]) -> str:
    """The `at=` selector of PEFT's `target_modules`.

    A list names modules by the end of their path: `["q_proj", "v_proj"]`, `["attn.qkv"]`. `"all-linear"` is every
    linear layer but the head; any other text is one whole path. A module that holds several sites, such as a fused
    qkv, is tuned at each.

    Raises:
        ConfigError: a regular expression, which a selector has not, or nothing.
    """
    if target_modules == ALL_LINEAR:
        return "kind=linear & role!=head"
    whole = isinstance(target_modules, str)
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"target_modules takes names of modules, or {ALL_LINEAR!r}; got {target_modules!r}")
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(
                f"target_modules={target_modules!r}: {name!r} is no name of a module, and regular "
                "expressions are not read: give a list of names, or at='path=…' with wildcards"
            )
    return "|".join(f"{'path' if whole else 'module'}={name}" for name in names)


def with_targets(init: Callable[..., None]) -> Callable[..., None]:
    """A method's constructor that takes `target_modules` in place of `at`."""

    @wraps(init)
    def taking(self: Any, *args: Any, target_modules: str | Sequence[str] | None = None, **fields: Any) -> None:
        if target_modules is not None:
            if args or "at" in fields:
                raise ConfigError(f"{type(self).__name__}: give at= or target_modules=, not both")
            fields["at"] = selector_of(target_modules)
        init(self, *args, **fields)

    return taking
