"""Where a method would sit in a model, and what it would train; the model is not changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from torch import nn

from mmpeft.bench.anatomy.overview import TENSORS, common, pattern, towers_of_tensors
from mmpeft.errors import MMPEFTError
from mmpeft.functional.rows import count_rows
from mmpeft.methods import Method
from mmpeft.methods.former import place
from mmpeft.methods.recipe import own_weight
from mmpeft.parts.base import Placement
from mmpeft.sites import Site
from mmpeft.surgery.attaching import base_tensors
from mmpeft.types import Kwargs

BY_DATA = "{} chooses by data what it trains: see mmpeft.allocate, or attach(model, method, data=loader)"


@dataclass(frozen=True)
class FittedPart:
    """One part: the role it plays, the module or tensor it works on, its parameters, and the sites they belong to."""

    role: str
    path: str
    tower: str
    parameters: int
    sites: tuple[tuple[Site, int], ...] = field(default=(), repr=False)
    """With how many of the parameters are of each."""


@dataclass(frozen=True)
class FittedRow:
    """Parts that differ in the numbers of their paths alone."""

    tower: str
    role: str
    path: str
    each: tuple[int, ...]
    """Parameters of each part."""


@dataclass(frozen=True)
class Fit:
    """A method in a model: its parts, or why there are none."""

    method: str
    seats: tuple[FittedPart, ...] = ()
    trainable: int = 0
    total: int = 0
    refused: str = ""

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    @property
    def rows(self) -> list[FittedRow]:
        groups: dict[tuple[str, str, str], list[FittedPart]] = {}
        for seat in self.seats:
            groups.setdefault((seat.tower, seat.role, pattern(seat.path)), []).append(seat)
        return [
            FittedRow(tower, role, common(seat.path for seat in own), tuple(seat.parameters for seat in own))
            for (tower, role, _), own in groups.items()
        ]

    def by_site(self) -> dict[int, int]:
        """Parameters at each site, by its identity."""
        found: dict[int, int] = {}
        for seat in self.seats:
            for site, count in seat.sites:
                found[id(site)] = found.get(id(site), 0) + count
        return found


def fit(model: nn.Module, method: Method, found: Sequence[Site], at: str = "", name: str = "") -> Fit:
    """What `attach` would do, without doing it: an `at` replaces the method's own, or restricts one without."""
    name = name or _text(method)
    try:
        if at:
            name = f"{name} at {at}"
            sited = any(own.name == "at" for own in fields(method))
            field: Kwargs = {"at": at}
            method = replace(method, **field) if sited else method.where(at)
        method.check(model, list(found))
        if method.needs_data:
            return Fit(name, refused=BY_DATA.format(type(method).__name__))
        placements = place(method.resolve(model), model, list(found))
    except MMPEFTError as error:
        return Fit(name, refused=str(error))
    towers = towers_of_tensors(found)
    seats = tuple(_seat(model, placement, found, towers) for placement in placements)
    tensors = {id(t): t.numel() for placement in placements for t in placement.part.parameters()}
    total = sum(tensor.numel() for _, tensor in base_tensors(model))
    return Fit(name, seats, sum(tensors.values()), total)


def _text(method: Method) -> str:
    """The method as Python has it, defaults left out."""
    parts = getattr(method, "methods", None)
    if isinstance(parts, list | tuple) and parts and all(isinstance(part, Method) for part in parts):
        return " + ".join(_text(part) for part in parts)
    given: list[str] = []
    for own in fields(method):
        value: object = getattr(method, own.name)
        if value != own.default and value != {} and value != ():
            given.append(f"{own.name}={_text(value) if isinstance(value, Method) else repr(value)}")
    return f"{type(method).__name__}({', '.join(given)})"


def _seat(model: nn.Module, placement: Placement, found: Sequence[Site], towers: dict[str, str]) -> FittedPart:
    count = sum(tensor.numel() for tensor in placement.part.parameters())
    hooks = placement.hooks
    paths = {hook.path for hook in hooks} or {placement.home}
    where = hooks[-1].path if hooks else placement.home
    if placement.role == "param" and hooks:
        own = [site for site in found if site.path == where and site.role != "param" and not site.dead]
        own = [site for site in own if site.kind in (*TENSORS, "norm")]
        name = hooks[-1].name
        reading = [site for site in own if name in (site.tensor, "bias")] or own
        path = f"{where}.{name}".lstrip(".")
        return FittedPart("param", path, towers.get(path, ""), count, _shares(model, reading, count))
    alike = [site for site in found if site.role == placement.role and _touches(site, paths)]
    labelled = [site for site in alike if placement.key.endswith(f"_{site.label}")] or alike
    if labelled:
        return FittedPart(placement.role, labelled[0].path, labelled[0].tower, count, ((labelled[0], count),))
    around = [site for site in found if site.role == "block" and where.startswith(f"{site.path}.")]
    given = ((around[-1], count),) if around else ()
    return FittedPart(placement.role or "shared", where, around[-1].tower if around else "", count, given)


def _touches(site: Site, paths: set[str]) -> bool:
    return bool(paths & {site.path, site.out, site.stream, site.entry} - {""}) or (not site.path and "" in paths)


def _shares(model: nn.Module, own: Sequence[Site], count: int) -> tuple[tuple[Site, int], ...]:
    """Parameters of a tensor shared out among the sites that own rows of it."""
    if len(own) < 2 or any(site.kind not in TENSORS for site in own):
        return tuple((site, count) for site in own[:1])
    rows = [count_rows(site.rows, len(own_weight(model, site))) for site in own]
    return tuple((site, count * size // sum(rows)) for site, size in zip(own, rows))
