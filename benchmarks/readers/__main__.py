"""Run every program's loaders on files of every kind, and write what came out as a table."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.readers.cases import cases
from benchmarks.readers.job import Job, write
from benchmarks.readers.page import Row, page, put, version_of
from benchmarks.readers.programs import PROGRAMS

EXACT = 1e-4
"""Relative error from which on a file counts as read otherwise."""

Files = Sequence[tuple[Job, dict[str, Tensor] | str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser("python -m benchmarks.readers", description=__doc__)
    parser.add_argument("--sources", type=Path, help="folder of checkouts; without it only what is installed")
    parser.add_argument("--only", nargs="*", choices=PROGRAMS, default=list(PROGRAMS), help="programs")
    parser.add_argument("--files", type=Path, help="folder to keep the files in; one that is there is read again")
    parser.add_argument("--write", type=Path, help="page to put the table into, between its marks")
    options = parser.parse_args(argv)
    chosen = [name for name in options.only if options.sources or PROGRAMS[name].package]
    with tempfile.TemporaryDirectory() as scratch:
        files = kept(options.files or Path(scratch) / "files")
        rows = [row for name in chosen for row in run(name, files, options.sources or Path(), Path(scratch))]
    unwritten = {(job.kind, job.format, job.method) for job, wanted in files if isinstance(wanted, str)}
    text = page(rows, {name: version_of(PROGRAMS[name], options.sources) for name in chosen}, unwritten)
    if options.write:
        put(text, options.write)
    else:
        print(text)
    return 0


def judged(wanted: dict[str, Tensor], base: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """`exact`, how far the change is from the one that was written, or that there is none."""
    square = off = 0.0
    lost = count = 0
    for name in wanted.keys() | got.keys():
        start = base[name].double()
        change = wanted.get(name, base[name]).double() - start
        found = got.get(name, base[name]).double() - start
        square += float(change.square().sum())
        off += float((found - change).square().sum())
        count += bool(change.any())
        lost += bool(change.any()) and not found.any()
    error = (off / square) ** 0.5
    if error < EXACT:
        return "exact"
    if lost == count:
        return "*nothing*"
    return f"{error:.2g}" + (f", *partly*: {lost} of {count} left out" if lost else "")


def kept(folder: Path) -> Files:
    """The files of a folder, written first where there are none."""
    index = folder / "index.pt"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save([(asdict(job), wanted) for job, wanted in cases(folder)], index)
    return [(Job(**job), wanted) for job, wanted in torch.load(index)]


def run(program: str, files: Files, sources: Path, folder: Path) -> list[Row]:
    """One program's reading of all files that are for it, in a process of its own.

    Raises:
        SystemExit: it does not run at all.
    """
    own = PROGRAMS[program]
    written = [(j, w) for j, w in files if j.kind in own.kinds and j.format in own.formats and not isinstance(w, str)]
    jobs = [replace(job, out=str(folder / f"{program}{i}.safetensors")) for i, (job, _) in enumerate(written)]
    write(jobs, folder / f"{program}.json")
    command = [sys.executable, "-m", f"benchmarks.readers.{program}", str(folder / f"{program}.json")]
    done = subprocess.run([*command, str(sources / own.folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} does not run: {done.stderr[-3000:]}")
    rows = []
    for job, (_, wanted) in zip(jobs, written):
        assert not isinstance(wanted, str)
        out = Path(job.out)
        if out.exists():
            result = judged(wanted, load_file(job.base), load_file(out))
        else:
            result = out.with_suffix(".txt").read_text()
        rows.append(Row(program, job.kind, job.format, job.method, result))
    return rows


if __name__ == "__main__":
    sys.exit(main())
