"""`use`: which tuning runs, in this thread, task or generator, or everywhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import FrameType

from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.hosting.running import ChosenRoute, choose, forgetting, generator_around
from mmpeft.surgery.planning import check_route
from mmpeft.surgery.state import state_with
from mmpeft.surgery.together import Entry, Route, Together


class use:
    """Choose the tuning that runs: a name, several `Together`, None for the plain backbone, or one for each row.

    As a context manager it holds for the block, in the thread, asyncio task or generator that runs it: others keep
    their own choice, so that a server may answer each request with another tuning at the same time. A thread begins
    with the model's own choice (use `contextvars.copy_context().run` or `asyncio.to_thread` to hand one on).

    Without `with` it takes effect at once and stays: for every thread and task that is in no `with` block of its own,
    or inside such a block until its end.

    Raises:
        ConfigError: an unknown name. Refused: tunings whose parts do not add up.
    """

    def __init__(self, model: nn.Module, which: Entry | Sequence[Entry]) -> None:
        state = state_with(model)
        route: Route = which if which is None or isinstance(which, str | Together) else tuple(which)
        if route == ():
            raise ConfigError("use() got an empty list; give one name (or None) for each row of the batch")
        check_route(model, route)
        choice = ChosenRoute(state, route)
        choice.plan()
        self._choice, self._frame = choice, None
        self._aside: AbstractContextManager[None] = forgetting(state)
        self._aside.__enter__()
        self._before = choose(state, choice)
        self._open = True

    _choice: ChosenRoute
    _frame: FrameType | None
    _open = False
    """Whether the choice is not yet settled: neither left again nor made for good."""

    def __enter__(self) -> use:
        choice, state = self._choice, self._choice.state
        choice.entered = True
        generator = generator_around(sys._getframe(1))
        if generator is None:
            choice.frame = id(_user(sys._getframe(1)))
        else:
            choose(state, self._before)
            self._frame = generator
            state.generators.setdefault(id(generator), (generator, []))[1].append(choice)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._open:
            return
        self._open = self._choice.entered = False
        state = self._choice.state
        if self._frame is None:
            choose(state, self._before)
        else:
            held = state.generators[id(self._frame)][1]
            held.remove(self._choice)
            if not held:
                del state.generators[id(self._frame)]
            self._frame = None
        self._aside.__exit__(None, None, None)

    def _settle(self) -> None:
        """Without `with`: outside every block it is the model's own choice from now on."""
        if self._open and not self._choice.entered:
            self._open = False
            if self._before is None:
                choose(self._choice.state, None)
                self._choice.state.default = self._choice

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():
            self._settle()

    def __repr__(self) -> str:
        self._settle()  # a notebook shows what the last line of a cell gave, and keeps it
        return f"use({self._choice.route!r})"


def _user(frame: FrameType | None) -> FrameType | None:
    """The frame that holds a `with` block: behind those of contextlib, and of generators that contextlib drives."""
    while frame is not None and (
        frame.f_globals.get("__name__") == "contextlib"
        or (frame.f_back is not None and frame.f_back.f_globals.get("__name__") == "contextlib")
    ):
        frame = frame.f_back
    return frame
