"""`State`: what a model carries of its tunings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import TYPE_CHECKING
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor, nn

from mmpeft.controllers import Controllers
from mmpeft.errors import ConfigError, StateError, nearest
from mmpeft.hosting.offload import looked, take_back
from mmpeft.hosting.recompute import Recompute
from mmpeft.hosting.running import ChosenRoute, PassLock, Planned, chosen
from mmpeft.methods.base import Method
from mmpeft.methods.placed import Bake
from mmpeft.parts.base import Placement
from mmpeft.surgery.liveness import Prints
from mmpeft.surgery.together import Route
from mmpeft.types import StateDict

if TYPE_CHECKING:
    from mmpeft.hosting.forward import HostPlan
    from mmpeft.surgery.row_proof import Proof

STATE = "_mmpeft_state"
PLANS_KEPT = 128
"""Routes whose plans are kept for their next use."""

_keys = itertools.count(1)


Planner = Callable[["State", Route], Planned]


@dataclass(eq=False)
class State:
    """All tunings of one model, shared by its hosts."""

    planner: Planner
    """Works out what every host does under a route."""
    hosts: dict[str, nn.Module] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    placements: dict[str, list[Placement]] = field(default_factory=dict)
    recompute: Recompute = None
    blocks: list[str] = field(default_factory=list)
    trained: dict[str, bool] = field(default_factory=dict)
    """requires_grad of every base tensor before the first tuning."""
    buffers: Prints = field(default_factory=dict)
    """What the base's buffers were before the first tuning."""
    merged: dict[str, list[tuple[str, str, Tensor | None]]] = field(default_factory=dict)
    """Originals `(host, attribute, tensor)` replaced by each merged tuning, in the order of merging."""
    controllers: dict[str, Controllers] = field(default_factory=dict)
    bakes: dict[str, Bake | None] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    """What fused layers around hosts said of their activation."""
    seats: int = 0
    """The number of the host that was made last."""

    def __post_init__(self) -> None:
        self._begin(None)

    def _begin(self, route: Route) -> None:
        """What belongs to this process and this very model, and not to a copy of it."""
        self.key = next(_keys)
        self.gate = PassLock()
        self.live: WeakSet[ChosenRoute] = WeakSet()
        self.generators: dict[int, tuple[FrameType, list[ChosenRoute]]] = {}
        """Choices of generators inside `with use(...)`, by frame, the innermost last."""
        self.kept: dict[Route, Planned] = {}
        self.numbers: dict[Route, int] = {}
        self.slots: dict[str, HostPlan] | None = None
        """Plans that serve every route of names for each row; None until one asks for them."""
        self.proofs: dict[Hashable, Proof] = {}
        """Whether rows stay apart, by kind of batch."""
        self.default = ChosenRoute(self, route)
        self.hooks = -1
        """How many hooks of accelerate's there were in this process when the parts were last looked after."""
        self.made: WeakValueDictionary[tuple[int, str], nn.Parameter] = WeakValueDictionary()
        """The tensors that parts were made with, by module and name."""

    def __getstate__(self) -> StateDict:
        """A copy runs what this context has chosen."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"route": self.route}

    def __setstate__(self, values: StateDict) -> None:
        values = dict(values)
        route = values.pop("route")
        self.__dict__.update(values)
        self._begin(route)

    @property
    def route(self) -> Route:
        """What runs in this context."""
        return chosen(self).route

    def plan(self, route: Route) -> Planned:
        """What every host does under a route; kept until the model changes."""
        found = self.kept.get(route)
        if found is None:
            found = self.planner(self, route)
            while len(self.kept) >= PLANS_KEPT:
                self.kept.pop(next(iter(self.kept)), None)
            self.kept[route] = found
        return found

    def number(self, route: Route) -> int | None:
        """The number of a route that is one name or none; None for others."""
        if isinstance(route, tuple):
            return None
        return self.numbers.setdefault(route, len(self.numbers))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change what the hosts do while no pass runs; every choice is planned anew afterwards."""
        with self.gate.alone(self):
            yield
            self.replan()

    def forget(self) -> None:
        """Drop all plans: each choice is planned when it next runs."""
        self.kept.clear()
        self.proofs.clear()
        self.slots = None
        for choice in list(self.live):
            choice.planned = None

    def replan(self) -> None:
        """Plan every choice anew; one that names what is gone says so when it next runs."""
        self.forget()
        for choice in list(self.live):
            try:
                choice.plan()
            except ConfigError:
                continue


def state_of(model: nn.Module) -> State | None:
    """The state of a model with tunings; None for a plain one."""
    return model.__dict__.get(STATE)


def state_with(model: nn.Module, name: str | None = None) -> State:
    """The state of a model, with `name` among its tunings.

    Raises:
        ConfigError: no tuning at all, or none of that name.
    """
    state = state_of(model)
    known = list(state.placements) if state else []
    if state is None or (name is not None and name not in state.placements):
        what = f"no tuning named {name!r}" if name is not None else "no tuning"
        raise StateError(f"the model has {what}; attached: {known or 'none'}.{nearest(name or '', known)}")
    if not looked(state):
        take_back(state)
    return state
