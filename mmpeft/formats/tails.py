"""Modules of a model by names that other libraries have for them."""

from __future__ import annotations

from collections.abc import Sequence


def module_of(path: str, modules: Sequence[str]) -> str:
    """The module that a path of another library means: of the same name, or the only one that ends as it does.

    What precedes the list of blocks differs among libraries (`model.h.0` of mlx_lm is `transformer.h.0`).
    """
    if path in modules:
        return path
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    for start in range(max(number, 1)):
        tail = ".".join(parts[start:])
        found = [name for name in modules if name == tail or name.endswith(f".{tail}")]
        if found:
            return found[0] if len(found) == 1 else path
    return path
