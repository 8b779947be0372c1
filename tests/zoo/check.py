"""Builds each model of the zoo and runs it on its example inputs, on fake tensors and for real.

    python -m tests.zoo.check timm             # every model not yet in the cache
    python -m tests.zoo.check open_clip 'ViT*' --again

Models run in worker processes with a timeout, one result a line in `outputs/zoo/<library>.jsonl`, so that a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

LIBRARIES = {
    "timm": ("tests.zoo.timm_models", "mmpeft.vision.inputs"),
    "torchvision": ("tests.zoo.torchvision_models", "mmpeft.vision.inputs"),
    "diffusers": ("tests.zoo.diffusers_models", "mmpeft.diffusion.inputs"),
    "open_clip": ("tests.zoo.open_clip_models", "mmpeft.vla.inputs"),
    "transformers": ("tests.zoo.hf", "mmpeft.llm.inputs"),
}


def check(library: str, name: str) -> dict[str, Any]:
    """One row: was it built, does it run on fake tensors, does it run for real afterwards."""
    models, inputs = (importlib.import_module(module) for module in LIBRARIES[library])
    row: dict[str, Any] = {"name": name, "built": False, "fake": False, "real": False}
    start = time.perf_counter()
    try:
        model = models.build(name).eval()
    except Exception as error:
        return {**row, "error": {"build": _says(error)}}
    row |= {"built": True, "build_s": _since(start), "parameters": sum(p.numel() for p in model.parameters())}
    errors: dict[str, str] = {}
    try:
        example = inputs.example_inputs(model)
    except Exception as error:
        return {**row, "error": {"inputs": _says(error)}}
    if example is None:
        return {**row, "error": {"inputs": "example_inputs gave None"}}
    for step, run in (("fake", run_fake), ("real", run_real)):
        start = time.perf_counter()
        try:
            run(model, *example)
            row[step] = True
        except Exception as error:
            errors[step] = _says(error)
        row[f"{step}_s"] = _since(start)
    if not row["real"]:  # or did the fake pass leave fake tensors behind?
        del model
        try:
            run_real(models.build(name).eval(), *example)
            row["real"] = True
            errors["left_behind"] = errors.pop("real")
        except Exception as error:
            errors["real"] = _says(error)
    return {**row, "error": errors}


def run_fake(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One pass on fake tensors, as a watch of the model runs it."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake:
            args, kwargs = tree_map(lambda x: fake.from_tensor(x) if isinstance(x, Tensor) else x, (args, kwargs))
            return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def run_real(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One pass for real; Raises ValueError where it gives no tensor."""
    with torch.no_grad():
        out = model(*args, **kwargs)
    if not any(isinstance(x, Tensor) for x in tree_leaves(_plain(out))):
        raise ValueError(f"expected tensors from {type(model).__name__}, received {type(out).__name__}")
    return out


def _plain(out: Any) -> Any:
    return dict(vars(out)) if hasattr(out, "__dict__") and not isinstance(out, Tensor | dict) else out


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _says(error: Exception) -> str:
    """The error and the last place outside torch that led to it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error).strip()[:300]} [{where}]"


def _work(library: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for module in LIBRARIES[library]:
        importlib.import_module(module)
    pipe.send("ready")  # a model's time does not include that of importing its library
    while True:
        pipe.send(check(library, pipe.recv()))
        gc.collect()


class _Worker:
    """A process that checks one model after another; ended and started anew where one takes too long."""

    def __init__(self, library: str, timeout: float) -> None:
        self.library, self.timeout, self.name = library, timeout, ""
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(self.library, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def give(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.pipe.send(name)

    def result(self) -> dict[str, Any] | None:
        """The row, or None while it is still at work."""
        died = ""
        try:
            if self.pipe.poll():
                return dict(self.pipe.recv())
            if time.monotonic() - self.since > self.timeout:
                died = f"no result within {self.timeout:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join(5)
            died = f"the process ended with {self.process.exitcode}"
        if not died:
            return None
        self.process.kill()
        self.process.join()
        name, self.name = self.name, ""
        self.start()
        return {"name": name, "built": False, "fake": False, "real": False, "error": {"worker": died}}


def run(library: str, pattern: str, cache: Path, jobs: int, timeout: float, again: bool) -> list[dict[str, Any]]:
    """The rows of all names that match; what the cache already holds is not run again."""
    rows = {row["name"]: row for row in map(json.loads, cache.read_text().splitlines())} if cache.exists() else {}
    names = fnmatch.filter(importlib.import_module(LIBRARIES[library][0]).names(), pattern)
    todo = [name for name in names if again or name not in rows][::-1]
    cache.parent.mkdir(parents=True, exist_ok=True)
    workers = [_Worker(library, timeout) for _ in range(min(jobs, len(todo)))]
    busy: list[_Worker] = []
    with cache.open("a") as file:
        while todo or busy:
            for worker in workers:
                if worker not in busy and todo:
                    worker.give(todo.pop())
                    busy.append(worker)
            wait([worker.pipe for worker in busy], timeout=1)
            for worker in list(busy):
                row = worker.result()
                if row is not None:
                    busy.remove(worker)
                    rows[row["name"]] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    print(_line(row), flush=True)
    for worker in workers:
        worker.process.kill()
    return [rows[name] for name in names]


def _line(row: dict[str, Any]) -> str:
    marks = " ".join(f"{step} {'ok' if row[step] else 'NO'}" for step in ("built", "real", "fake"))
    size = f"{row.get('parameters', 0) / 1e6:7.1f} M {row.get('real_s', 0):6.1f} s {row.get('fake_s', 0):6.1f} s"
    errors = "".join(f"\n    {step}: {error}" for step, error in row.get("error", {}).items())
    return f"{row['name']:45} {marks} {size}{errors}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--again", action="store_true", help="run also what the cache holds")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a model may take")
    parser.add_argument("--cache", type=Path, default=Path("outputs/zoo"))
    given = parser.parse_args()
    cache = given.cache / f"{given.library}.jsonl"
    rows = run(given.library, given.pattern, cache, given.jobs, given.timeout, given.again)
    for row in rows:
        if row.get("error"):
            print(_line(row))
    counts = {step: sum(bool(row[step]) for row in rows) for step in ("built", "real", "fake")}
    print(f"{given.library}: " + ", ".join(f"{step} {count} of {len(rows)}" for step, count in counts.items()))
    return int(counts["real"] < len(rows))


if __name__ == "__main__":
    sys.exit(main())
