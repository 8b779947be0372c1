"""What a tuning trains, where, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mmpeft.surgery.attaching import base_tensors

if TYPE_CHECKING:
    from mmpeft.surgery.attached import Attached


@dataclass(frozen=True)
class ReportRow:
    """One role of the report."""

    role: str
    sites: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """Parameters by role; `trainable` counts this tuning, `total` the base model."""

    title: str
    rows: list[ReportRow]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable parameters as a share of the base model."""
        return self.trainable / self.total

    def __rich__(self) -> Table:
        table = Table(title=self.title)
        for name in ("role", "sites", "parameters", "KiB"):
            table.add_column(name, justify="left" if name == "role" else "right")
        for row in self.rows:
            table.add_row(row.role, str(row.sites), f"{row.parameters:,}", f"{row.bytes / 1024:,.1f}")
        table.add_section()
        kib = sum(row.bytes for row in self.rows) / 1024
        sites = str(sum(row.sites for row in self.rows))
        table.add_row(f"all ({self.share:.3%} of {self.total:,})", sites, f"{self.trainable:,}", f"{kib:,.1f}")
        return table

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def report(tuning: Attached) -> Report:
    """Tabulate a tuning by role."""
    by_role: dict[str, list[tuple[int, int]]] = {}
    for placement in tuning.placements:
        tensors = list(placement.part.parameters())
        size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
        by_role.setdefault(placement.role, []).append(size)
    rows = [
        ReportRow(role, len(sizes), sum(n for n, _ in sizes), sum(b for _, b in sizes))
        for role, sizes in by_role.items()
    ]
    return Report(
        title=f"{tuning.name}: {type(tuning.method).__name__} on {type(tuning.model).__name__.removeprefix('Tuned')}",
        rows=rows,
        trainable=sum(p.numel() for p in tuning.parameters()),
        total=sum(p.numel() for _, p in base_tensors(tuning.model)),
    )
