"""Whether every product by a parameter is a site, or is named as left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from mmpeft.functional.rows import Rows
from mmpeft.sites import Site
from mmpeft.sites.record import Op, Record

PRODUCTS = ("linear", "conv", "experts")
"""Kinds of sites that are products by a parameter."""


def coverage(record: Record, found: list[Site], parameters: Collection[str]) -> dict[str, Any]:
    """Products of a pass (look-ups apart), how many are left out and why, and those that no site speaks of."""
    own: dict[str, list[Site]] = {}
    for site in found:
        if site.kind in (*PRODUCTS, "embedding") or site.refuse:
            own.setdefault(f"{site.path}.{site.tensor}".lstrip("."), []).append(site)
    products = {op.weight.name: op for op in record.ops if op.weight is not None and op.name != "embedding"}
    products = {name: op for name, op in products.items() if name in parameters}
    left: Counter[str] = Counter()
    missed = []
    for name, op in products.items():
        sites = own.get(name) or own.get(_computed(name), [])
        refused = [site.refuse for site in sites if site.refuse]
        if refused:
            left[refused[0]] += 1
        elif not sites or not _whole(sites, op):
            missed.append(name)
    return {"products": len(products), "left": left, "missed": missed}


def _computed(name: str) -> str:
    """The weight that a parametrization makes of its own parameters."""
    return re.sub(r"\.parametrizations\.(\w+)\.original\d*$", r".\1", name)


def _whole(sites: list[Site], op: Op) -> bool:
    """Whether the rows of a parameter's sites are all that a product reads."""
    if any(site.rows is None for site in sites):
        return True
    total = op.shape[1] if op.name == "convolution" else op.shape[-1]
    return len(set().union(*(_listed(site.rows, total) for site in sites if site.rows))) >= total


def _listed(rows: Rows, total: int) -> set[int]:
    start, stop, *period = rows
    step = period[0] if period else max(total, 1)
    return (
        {i + shift for shift in range(0, total, step) for i in range(start, stop)}
        if period
        else set(range(start, stop))
    )
