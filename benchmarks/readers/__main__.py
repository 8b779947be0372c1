"""Runs every reader on every file and writes the table."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.readers.cases import KINDS, cases
from benchmarks.readers.job import Job, write
from benchmarks.readers.programs import PROGRAMS


@dataclass(frozen=True)
class Row:
    """What one reader makes of one file."""

    reader: str
    kind: str
    format: str
    method: str
    result: str


def judged(wanted: dict[str, Tensor], base: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """`exact`, how far the change is from the one that was written, or that there is none."""
    square = off = 0.0
    lost = 0
    for name in wanted.keys() | got.keys():
        start = base[name].double()
        change = wanted.get(name, base[name]).double() - start
        found = got.get(name, base[name]).double() - start
        square += float(change.square().sum())
        off += float((found - change).square().sum())
        lost += bool(change.any()) and not found.any()
    error = (off / square) ** 0.5
    if error < 1e-4:
        return "exact"
    if lost == len(wanted):
        return "**nothing**"
    return f"**off by {error:.2g}**" + (f", {lost} of {len(wanted)} tensors left out" if lost else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.readers", description=__doc__)
    parser.add_argument("--sources", type=Path, help="folder of checkouts")
    parser.add_argument("--only", nargs="*", default=list(PROGRAMS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--files", type=Path, help="folder to keep the files in; one that is there is read again")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        files = list(cases(Path(scratch), tuple(options.kinds))) if not options.files else kept(options.files)
        files = [(job, wanted) for job, wanted in files if job.kind in options.kinds]
        for job, wanted in files:
            if isinstance(wanted, str) and not options.files:
                print(f"{job.kind:8}{job.format:10}{job.method:24} not written: {wanted[:150]}")
        for program in options.only:
            rows = run(program, files, options.sources, Path(scratch))
            show(rows)
    return 0


def show(rows: Sequence[Row]) -> None:
    """Rows by what came out, methods together."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.reader, row.kind, row.format, row.result), []).append(row.method)
    for (reader, kind, format, result), methods in groups.items():
        print(f"{reader:12}{kind:8}{format:10}{result}: {', '.join(methods)}")


def kept(folder: Path) -> list[tuple[Job, dict[str, Tensor] | str]]:
    """The files of a folder, written first where there are none."""
    index = folder / "index.pt"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save([(asdict(job), wanted) for job, wanted in cases(folder)], index)
    return [(Job(**job), wanted) for job, wanted in torch.load(index)]


def run(program: str, files: Sequence[tuple[Job, dict[str, Tensor] | str]], sources: Path, folder: Path) -> list[Row]:
    own = PROGRAMS[program]
    name = own.name
    chosen = [(job, wanted) for job, wanted in files if job.kind in own.kinds and job.format in own.formats]
    written = [(job, wanted) for job, wanted in chosen if not isinstance(wanted, str)]
    jobs = [replace(job, out=str(folder / f"{program}{i}.safetensors")) for i, (job, _) in enumerate(written)]
    write(jobs, folder / f"{program}.json")
    command = [sys.executable, "-m", f"benchmarks.readers.{program}", str(folder / f"{program}.json")]
    done = subprocess.run([*command, str(sources / own.folder)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:])
        raise SystemExit(f"{program} does not run")
    rows = []
    for job, (_, wanted) in zip(jobs, written):
        assert not isinstance(wanted, str)
        out = Path(job.out)
        if out.exists():
            result = judged(wanted, load_file(job.base), load_file(out))
        else:
            result = f"refused: {out.with_suffix('.txt').read_text()[:120]}"
        rows.append(Row(name, job.kind, job.format, job.method, result))
    return rows


if __name__ == "__main__":
    sys.exit(main())
