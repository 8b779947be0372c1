"""An overview of a model as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mmpeft.bench.anatomy.fit import Fit
from mmpeft.bench.anatomy.overview import Line, Overview, Tower
from mmpeft.functional.rows import Rows


def tables(found: Overview, fitted: Fit | None = None) -> Group:
    """Towers, then the sites of each, what is refused or left out, and where a method would sit."""
    shown: list[RenderableType] = [_towers(found)]
    shown += [_sites(tower) for tower in found.towers if tower.lines]
    shown += _left_out(found)
    if fitted is not None:
        shown.append(_fit(fitted))
    return Group(*shown)


def shape_text(shapes: Iterable[tuple[int, ...]]) -> str:
    """`768×3072`, and `64…512` where it is not the same everywhere."""
    return "×".join(_range(sizes) for sizes in zip(*shapes))


def _range(numbers: Iterable[int]) -> str:
    own = sorted(set(numbers))
    return f"{own[0]:,}".replace(",", "") if len(own) == 1 else f"{own[0]}…{own[-1]}"


def rows_text(rows: Rows | None) -> str:
    """`0:768`, or `0:64 of 192` where every period of so many rows has them."""
    if rows is None:
        return ""
    return f"{rows[0]}:{rows[1]}" + (f" of {rows[2]}" if len(rows) == 3 else "")


def _titled(title: str, table: Table) -> Group:
    return Group(Text(f"\n{title}", style="bold"), table)


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _towers(found: Overview) -> Group:
    title = f"{found.name}: {found.cls}, {found.parameters:,} parameters, watched in {found.seconds:.1f} s"
    table = _table("tower", "blocks", "sites", "parameters", right=("blocks", "sites", "parameters"))
    for tower in found.towers:
        sites = sum(len(line.sites) for line in tower.lines)
        table.add_row(tower.title, str(tower.blocks), f"{sites:,}", f"{tower.parameters:,}")
    return _titled(title, table)


COLUMNS = ("role", "path", "shape", "rows", "via", "refused")


def _sites(tower: Tower) -> Group:
    """The sites of a tower: what stands before the blocks, blocks that are alike, and the rest."""
    reasons = list(dict.fromkeys(line.refuse for line in tower.lines if line.refuse))
    parts = [("", tower.before), *((f"{f.title}  {f.path}", f.lines) for f in tower.folds)]
    parts.append(("outside blocks", tower.behind))
    cells = [(title, [_cells(line, reasons) for line in lines]) for title, lines in parts if lines]
    every = [COLUMNS, *(row for _, rows in cells for row in rows)]
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in every[1:])]
    widths = [max(len(row[i]) for row in every) for i in range(len(COLUMNS))]
    shown: list[RenderableType] = [Text(f"\n{tower.title}", style="bold")]
    for number, (title, rows) in enumerate(cells):
        table = Table.grid(padding=(0, 2))
        for i in used:
            justify: Literal["left", "right"] = "right" if COLUMNS[i] == "shape" else "left"
            table.add_column(justify=justify, min_width=widths[i] if i != 1 else None, width=None, overflow="fold")
        if number == 0:
            table.add_row(*(Text(COLUMNS[i], style="dim") for i in used))
        for row in rows:
            style = "dim" if row[-1] else None
            table.add_row(*(Text(row[i].ljust(widths[i]) if i == 1 else row[i]) for i in used), style=style)
        shown += [Text(f"{title}", style="bold cyan")] if title else []
        shown.append(Padding(table, (0, 0, 0, 2)))
    shown += [Text(f"  [{i}] {reason}", style="dim") for i, reason in enumerate(reasons, 1)]
    return Group(*shown)


def _cells(line: Line, reasons: list[str]) -> tuple[str, ...]:
    path = (line.path or ".") + (f"  ×{line.count}" if line.count > 1 else "")
    rows = rows_text(line.rows) or ("a part" if line.is_fused else "")
    refused = f"[{reasons.index(line.refuse) + 1}]" if line.refuse else ""
    return line.role, path, shape_text(line.shapes), rows, line.via, refused


def _left_out(found: Overview) -> list[RenderableType]:
    """Projections that cannot be tuned, and tensors that only `param` reaches."""
    dead: dict[tuple[str, str], int] = {}
    for line in found.lines:
        if line.dead or (line.refuse and line.kind in ("linear", "conv", "embedding")):
            key = (line.refuse, f"{line.role} {line.path}".strip())
            dead[key] = dead.get(key, 0) + len(line.sites)
    if not dead and not found.rest and not found.small:
        return []
    table = _table("what", "shape", "why", right=("shape",))
    for (reason, what), count in dead.items():
        table.add_row(Text(f"{what} ({count})"), "", Text(reason))
    why = "no projection: a named tensor (role param)"
    for path, shape, count in found.rest:
        table.add_row(Text(f"{path} ({count})" if count > 1 else path), shape_text([shape]), Text(why))
    if found.small:
        table.add_row("biases and other vectors", f"{found.small:,} in all", Text(why))
    return [_titled("Left out", table)]


def _fit(fitted: Fit) -> RenderableType:
    if fitted.refused:
        return Text(f"{fitted.method} is refused: {fitted.refused}", style="bold red")
    columns = ("tower", "role", "path", "parts", "each", "in all")
    title = f"{fitted.method} would train {fitted.trainable:,} parameters, {fitted.share:.3%} of the model"
    table = _table(*columns, right=("parts", "each", "in all"))
    for row in fitted.rows:
        each = f"{min(row.each):,}" + (f"…{max(row.each):,}" if len(set(row.each)) > 1 else "")
        cells = (row.tower, row.role, row.path or ".", str(len(row.each)), each, f"{sum(row.each):,}")
        table.add_row(*map(Text, cells))
    return _titled(title, table)
