"""Timing side by side, for the benchmarks of this folder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each step; all run in turn, so that whatever the machine does hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
