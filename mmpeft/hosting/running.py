"""What runs: each thread, task and generator's own choice of tunings, and what every host does under it.

A route belongs to the context that chose it, not to the model. A pass through the model is pinned to the choice it
began under; the backward pass remembers it, for forward passes that activation checkpointing repeats there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from mmpeft.errors import Refused
from mmpeft.types import Argument, Forward, Output

if TYPE_CHECKING:
    from mmpeft.hosting.forward import HostPlan
    from mmpeft.surgery.state import State
    from mmpeft.surgery.together import Route


class Planned:
    """A route of one model, and what its hosts do under it.

    `plans` maps a host's seat to its plan; hosts that are not named run plain. `rows`, at the root, decides how a route
    for each row is carried out, and `whole` says that only passes through the whole model can. `number` is that of a
    route whose plans the seats know too: code compiled for one block can then serve every block.
    """

    def __init__(
        self,
        state: State,
        route: Route,
        plans: dict[int, HostPlan],
        number: int | None = None,
        rows: Forward | None = None,
        whole: bool = False,
    ) -> None:
        self.state, self.route, self.plans, self.number = state, route, plans, number
        self.rows, self.whole = rows, whole
        self.slots: Tensor | None = None
        """Under a route for each row: the number of each row's tuning, from 1 in the order of attaching; 0 for none."""


class ChosenRoute:
    """A route that a context, a generator or the model itself has chosen."""

    def __init__(self, state: State, route: Route) -> None:
        self.state, self.route = state, route
        self.planned: Planned | None = None
        """None until it is planned, and after a change of the model that it cannot follow."""
        self.entered = False
        """Whether a `with` block of some context holds it."""
        self.frame: int | None = None
        """The frame whose `with` block holds it."""
        state.live.add(self)

    def plan(self) -> Planned:
        """What runs under it."""
        if self.planned is None:
            self.planned = self.state.plan(self.route)
        return self.planned


RUNNING: ContextVar[Planned | None] = ContextVar("mmpeft_running", default=None)
"""What the pass that runs in this context is pinned to."""

CHOICES: ContextVar[dict[int, ChosenRoute]] = ContextVar("mmpeft_choices", default={})  # noqa: B039 - replaced, never changed
"""This context's choices by the number of the model's state; a new dictionary each time."""


def choose(state: State, choice: ChosenRoute | None) -> ChosenRoute | None:
    """Set this context's choice for a model, None for the model's own; return the former one."""
    choices = dict(CHOICES.get())
    before = choices.pop(state.key, None)
    if choice is not None:
        choices[state.key] = choice
    CHOICES.set(choices)
    return before


def chosen(state: State) -> ChosenRoute:
    """What this context has chosen; the model's own choice where it has not."""
    choice = CHOICES.get().get(state.key)
    if choice is None:
        choice = state.default
    return _of_frames(state, choice) if state.generators else choice


def current(state: State) -> Planned:
    """What a pass that begins now runs: what the backward pass remembers, or what this context has chosen."""
    if torch.compiler.is_compiling():
        choice = chosen(state)
        return choice.planned if choice.planned is not None else choice.plan()
    found = recalled(state) or chosen(state).plan()
    if not torch.is_grad_enabled():
        _keep_with_region(found)
    return found


# -- generators -----------------------------------------------------------------------------------------------

BRACKETS = ("contextlib", "_pytest.fixtures")
"""Modules that drive a generator to run other code between its halves, which then is inside its `with` blocks."""


def generator_around(frame: FrameType | None) -> FrameType | None:
    """The generator whose own code runs in a frame; None in functions and coroutines, which have a context.

    A generator has none: suspended inside `with use(...)`, it would leave its choice to whoever asked for a value.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") in BRACKETS:
            frame = frame.f_back
        elif not frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
            return None
        elif frame.f_back is not None and frame.f_back.f_globals.get("__name__") in BRACKETS:
            frame = frame.f_back
        else:
            return frame
    return None


def _of_frames(state: State, choice: ChosenRoute) -> ChosenRoute:
    """The innermost choice among those of running generators and that of the context."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if id(frame) == choice.frame:
            return choice
        held = state.generators.get(id(frame))
        if held is not None:
            return held[1][-1]
        frame = frame.f_back
    return choice


# -- the backward pass ------------------------------------------------------------------------------------------


class _Recall(threading.local):
    """What the backward passes of this thread remember, by their numbers: a reentrant checkpoint has one in another."""

    passes: dict[int, WeakValueDictionary[int, Planned]]

    def __init__(self) -> None:
        self.passes = {}


_RECALL = _Recall()
NESTED = 8
"""Backward passes inside one another that are told apart."""


def _backward_pass() -> int:
    """The number of the backward pass that this thread runs; -1 outside of one."""
    return torch._C._current_graph_task_id()


class _Remember:
    """Before the gradient of an output: what the output was computed under runs again in this thread."""

    def __init__(self, planned: Planned) -> None:
        self.planned = planned

    def __call__(self, grads: object) -> None:
        passes, own = _RECALL.passes, _backward_pass()
        for ended in [number for number in passes if number > own] + sorted(passes)[:-NESTED]:
            passes.pop(ended, None)
        passes.setdefault(own, WeakValueDictionary())[self.planned.state.key] = self.planned


def remember(output: Output, planned: Planned) -> None:
    """Have the backward pass of every tensor of an output remember the route; the tensors stay as they are."""
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return
    seen: set[int] = set()
    for value in tree_leaves(output):
        node = value.grad_fn if isinstance(value, Tensor) else None
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            node.register_prehook(_Remember(planned))


def recalled(state: State) -> Planned | None:
    """What the backward pass that runs in this thread remembers; None outside of one."""
    own = _backward_pass()
    if own == -1:
        return None
    region = _region(CheckpointFunction.backward.__code__)
    kept: dict[int, Planned] = getattr(region, REGION, {})
    return kept.get(state.key) or _RECALL.passes.get(own, kept).get(state.key)


REGION = "_mmpeft_planned"
"""Where a reentrant checkpoint keeps what ran in it: nothing that leaves it has a gradient to remember by."""


def _keep_with_region(planned: Planned) -> None:
    region = _region(CheckpointFunction.forward.__code__)
    if region is not None:
        region.__dict__.setdefault(REGION, {})[planned.state.key] = planned


def _region(code: CodeType) -> Any:
    """The context of the reentrant checkpoint that this thread is in, by the code that runs it; None outside."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["ctx"]


@contextmanager
def forgetting(state: State) -> Iterator[None]:
    """Run with no pass pinned and nothing recalled: a choice made inside a pass holds from there on."""
    running: Planned | None = RUNNING.get()
    passes: Any = _RECALL.passes.get(_backward_pass(), {})
    remembered = passes.pop(state.key, None)
    token = RUNNING.set(None) if running is not None and running.state is state else None
    try:
        yield
    finally:
        if token is not None:
            RUNNING.reset(token)
        if remembered is not None:
            passes[state.key] = remembered


class Pinned:
    """A function that runs under what its maker ran under, wherever it is repeated."""

    def __init__(self, run: Forward) -> None:
        self.run, self.planned = run, RUNNING.get()

    def __call__(self, *args: Argument, **kwargs: Argument) -> Output:
        if self.planned is None or RUNNING.get() is self.planned:
            return self.run(*args, **kwargs)
        token = RUNNING.set(self.planned)
        try:
            return self.run(*args, **kwargs)
        finally:
            RUNNING.reset(token)


# -- passes and changes -----------------------------------------------------------------------------------------


class PassLock:
    """Passes through a model run side by side; a change of its parts waits for them, and they for it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._passes: dict[object, int] = {}
        """Passes under way, and the thread of each."""
        self._changing: int | None = None
        self._depth = 0

    def enter(self, running: object) -> None:
        """Begin a pass; `leave` it in any case, even if an interrupt comes in here."""
        with self._condition:
            while self._changing is not None and self._changing != threading.get_ident():
                self._condition.wait()
            self._passes[running] = threading.get_ident()

    def leave(self, running: object) -> None:
        """End a pass, if it has begun."""
        with self._condition:
            self._passes.pop(running, None)
            if not self._passes:
                self._condition.notify_all()

    @contextmanager
    def alone(self, state: State) -> Iterator[None]:
        """Change the model's parts while no pass runs.

        Raises:
            Refused: this very thread is inside a pass, which would wait for itself.
        """
        running = RUNNING.get()
        if running is not None and running.state is state:
            raise Refused("a model cannot be changed in its own forward pass; do so before or after it")
        own, begun = threading.get_ident(), False
        try:
            with self._condition:
                if running is None:  # an interrupt may have come before a pass of this thread could say that it ended
                    self._passes = {one: thread for one, thread in self._passes.items() if thread != own}
                while self._changing not in (None, own) or (self._passes and self._changing != own):
                    self._condition.wait()
                self._changing, self._depth, begun = own, self._depth + 1, True
            yield
        finally:
            with self._condition:
                self._depth -= begun
                if begun and not self._depth:
                    self._changing = None
                    self._condition.notify_all()
