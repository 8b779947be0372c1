"""Cells that must be refused, and a word of the reason; every other cell must work."""

from __future__ import annotations

from fnmatch import fnmatch

WINDOWS = "window"
REFUSED = {
    ("VPT*", "beit"): "relative-position bias",
    ("VPT*", "swin*"): WINDOWS,
    ("VPT*", "convnext"): "no token sequence",
    ("AdaptFormer", "convnext"): "residual stream",
    ("Houlsby", "convnext"): "no site",
}
"""(method pattern, family pattern) -> part of the reason."""

UNMERGEABLE = {
    ("SSF", "beit"): "no state dict",
    ("SSF", "eva02"): "no state dict",
    ("SSF", "swinv2"): "no state dict",
}
"""Cells that work and cannot be merged, beyond the methods that never can."""


def reason(table: dict[tuple[str, str], str], label: str, family: str) -> str | None:
    """The expected reason for a cell, or None."""
    return next((why for (m, f), why in table.items() if fnmatch(label, m.replace("[", "[[]")) and fnmatch(family, f)), None)
