"""Measuring side by side: steps that take turns, kernels counted, figures with their spread, tables."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How to measure: where, how many turns, and whether sizes only have to show that everything runs."""

    device: torch.device
    rounds: int
    quick: bool
    said: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print a piece of the report, and keep it."""
        print(text, flush=True)
        self.said.append(text)

    def now(self) -> float:
        """Seconds; on one CPU thread those of this process, which other work on the machine does not lengthen."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


class Turns:
    """Seconds of steps that took turns: `seconds[name][turn]`. Ratios are formed within a turn, then summed up."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self.seconds = seconds

    def time(self, name: str, scale: float = 1.0) -> Spread:
        return Spread.of(scale * own for own in self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread:
        return Spread.of(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True))

    def added(self, name: str, other: str, scale: float = 1.0) -> Spread:
        return Spread.of(scale * (a - b) for a, b in zip(self.seconds[name], self.seconds[other], strict=True))


def interleaved(steps: Mapping[str, Step], setting: Setting, rounds: int = 0, calls: int = 1) -> Turns:
    """Seconds a call of each step. All run in turn, every second turn backwards, so that what the machine does hits
    all of them alike; a first turn warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for turn in range((rounds or setting.rounds) + 1):
            for name in list(steps)[:: 1 if turn % 2 else -1]:
                step = steps[name]
                start = setting.now()
                for _ in range(calls):
                    step()
                if turn:
                    seconds[name].append((setting.now() - start) / calls)
            gc.collect()
    finally:
        gc.enable()
    return Turns(seconds)


class _Kernels(TorchDispatchMode):
    """Counts operators that compute: views and bare allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count += not (func.is_view or name.startswith(("aten::empty", "aten::_unsafe_view", "aten::sym_")))
        return func(*args, **(kwargs or {}))


def kernel_calls(step: Step) -> int:
    """Operators that a step runs, backward pass included."""
    with _Kernels() as found:
        step()
    return found.count


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, figures to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
