"""Which cells must be refused, which are held to the invariants, and which of them today."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.matrix.cells import ALIKE, CELLS, Cell
from tests.matrix.families.timm import SHALLOW
from tests.matrix.table import written
from tests.support import shares


def _refused(cell: Cell) -> bool:
    """By docs/matrix.md, which another test holds to what methods need and refuse; a new cell must work."""
    mark, _ = written().get(cell.family, {}).get(cell.label, ("●", ""))
    return not mark


REFUSALS = [cell for cell in CELLS if _refused(cell)]
WORKING = [cell for cell in CELLS if not _refused(cell)]
COMPILED = [cell for cell in WORKING if cell.family in SHALLOW and "[" not in cell.label and cell.label not in ALIKE]


class Table(NamedTuple):
    """Cells, and what of them every day's share must have one of."""

    cells: list[Cell]
    keys: Callable[[Cell], tuple[tuple[str, str], ...]]


def _method_and_family(cell: Cell) -> tuple[tuple[str, str], ...]:
    return ("method", cell.label), ("family", cell.family)


def _family(cell: Cell) -> tuple[tuple[str, str], ...]:
    return (("family", cell.family),)


TABLES = {
    "refusal": Table(REFUSALS, _method_and_family),
    "working": Table(WORKING, _method_and_family),
    "compile": Table(COMPILED, _family),
}


def of_today(table: str, seed: str | None = None) -> list[Cell]:
    """The cells of a table whose turn it is under a seed, by default the session's."""
    return shares.of_today(*TABLES[table], seed=seed)
