"""Runs every reader on every file and writes the table."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.readers.cases import KINDS, cases
from benchmarks.readers.job import Job, write

PROGRAMS = {"comfyui": ("ComfyUI", "ComfyUI")}
"""Module of this package → the program's name, and its folder under the sources."""


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
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        files = list(cases(Path(scratch), tuple(options.kinds)))
        for job, wanted in files:
            if isinstance(wanted, str):
                print(f"{job.kind:8}{job.format:10}{job.method:24} not written: {wanted[:150]}")
        for program in options.only:
            rows = run(program, files, options.sources, Path(scratch))
            for row in rows:
                print(f"{row.reader:12}{row.kind:8}{row.format:10}{row.method:24}{row.result}")
    return 0


def run(program: str, files: Sequence[tuple[Job, dict[str, Tensor] | str]], sources: Path, folder: Path) -> list[Row]:
    name, place = PROGRAMS[program]
    written = [(job, wanted) for job, wanted in files if not isinstance(wanted, str)]
    jobs = [replace(job, out=str(folder / f"{program}{i}.safetensors")) for i, (job, _) in enumerate(written)]
    write(jobs, folder / f"{program}.json")
    command = [sys.executable, "-m", f"benchmarks.readers.{program}", str(folder / f"{program}.json")]
    done = subprocess.run([*command, str(sources / place)], capture_output=True, text=True)
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
