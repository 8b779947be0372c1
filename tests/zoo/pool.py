"""Worker processes for what may take long or end a process: one task after another, each with a timeout.

Results are rows of JSON, one a line in a file, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def cached(file: Path) -> dict[str, Row]:
    """The newest row of each name."""
    return {row["name"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}


def run(
    task: str, library: str, names: Iterable[str], file: Path, jobs: int, timeout: float, show: Callable[[Row], None]
) -> None:
    """Give each name to `task` (`module:function`, called with the library and the name) and append what it answers."""
    todo = list(names)[::-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    workers = [_Worker(task, library, timeout) for _ in range(min(jobs, len(todo)))]
    busy: list[_Worker] = []
    try:
        with file.open("a") as out:
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
                        print(json.dumps(row), file=out, flush=True)
                        show(row)
    finally:
        for worker in workers:
            worker.process.kill()


def _work(task: str, library: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    home, _, name = task.partition(":")
    function = getattr(importlib.import_module(home), name)
    function(library, "")  # a model's time does not include that of importing its library
    pipe.send("ready")
    while True:
        pipe.send(function(library, pipe.recv()))
        gc.collect()


class _Worker:
    """A process that does one task after another; ended and started anew where one takes too long."""

    def __init__(self, task: str, library: str, timeout: float) -> None:
        self.task, self.library, self.timeout, self.name = task, library, timeout, ""
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(self.task, self.library, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def give(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.pipe.send(name)

    def result(self) -> Row | None:
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
        return {"name": name, "error": {"worker": died}}
