"""Judges every model of the zoo: `make zoo`, which then writes docs/zoo.md.

    python -m tests.zoo.run                      # every model not yet in the cache
    python -m tests.zoo.run timm 'res*' --again

Models run in worker processes with a timeout; their rows are lines of JSON in `outputs/zoo/<library>.jsonl`.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import sys
from pathlib import Path

from tests.zoo import pool
from tests.zoo.judge import LIBRARIES
from tests.zoo.pool import Row

TASK = "tests.zoo.judge:judge"


def line(row: Row) -> str:
    """A row in short, and under it what went wrong."""
    tried = row.get("methods", {})
    marks = " ".join(f"{name} {result['state']}" for name, result in tried.items() if result["state"] != "ok")
    size = f"{row.get('parameters', 0) / 1e6:6.1f} M {row.get('watch_s', 0):5.1f} s {row.get('watch', '')}"
    counts = f"{row.get('sites', 0):4} sites {row.get('blocks', 0):3} blocks {','.join(row.get('towers', []))}"
    covered = f"{len(row['missed'])} of {row['products']} MISSED" if row.get("missed") else ""
    errors = {**row.get("error", {})}
    errors |= {name: result["why"] for name, result in tried.items() if result["state"] == "FAIL"}
    below = "".join(f"\n    {step}: {error}" for step, error in errors.items())
    missed = f"\n    missed: {' '.join(row['missed'][:6])}" if row.get("missed") else ""
    peft = row.get("peft", {})
    beside = f"peft {peft.get('state')} {peft.get('live', 0)}/{peft.get('layers', 0)}"
    return f"{row['name']:34} {size} {counts} {row.get('seconds', 0):5.1f} s {beside} {marks} {covered}{missed}{below}"


def is_whole(row: Row) -> bool:
    """Whether every product is a site or left out with a reason, and LoRA lives."""
    return not row["error"] and not row["missed"] and row["methods"]["LoRA"]["state"] == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", choices=LIBRARIES)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--again", action="store_true", help="run also what the cache holds")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds a model may take")
    parser.add_argument("--cache", type=Path, default=Path("outputs/zoo"))
    given = parser.parse_args()
    for library in [given.library] if given.library else LIBRARIES:
        file = given.cache / f"{library}.jsonl"
        names = fnmatch.filter(importlib.import_module(LIBRARIES[library]).names(), given.pattern)
        known = {} if given.again else pool.cached(file)
        todo = [name for name in names if name not in known]
        pool.run(TASK, library, todo, file, given.jobs, given.timeout, lambda row: print(line(row), flush=True))
        rows = pool.cached(file)
        whole = sum(is_whole(rows[name]) for name in names)
        print(f"{library}: {whole} of {len(names)} with every product a site and LoRA live")
    return 0


if __name__ == "__main__":
    sys.exit(main())
