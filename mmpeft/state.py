"""`State`: what a model carries of its tunings."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from mmpeft.controllers import Controllers
from mmpeft.errors import ConfigError, nearest
from mmpeft.liveness import Prints
from mmpeft.methods.base import Method
from mmpeft.parts.base import Placement
from mmpeft.recompute import Recompute
from mmpeft.together import Route

STATE = "_mmpeft_state"


@dataclass
class State:
    """All tunings of one model, shared by its hosts."""

    hosts: dict[str, nn.Module] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    placements: dict[str, list[Placement]] = field(default_factory=dict)
    route: Route = None
    recompute: Recompute = None
    blocks: list[str] = field(default_factory=list)
    trained: dict[str, bool] = field(default_factory=dict)
    """requires_grad of every base tensor before the first tuning."""
    buffers: Prints = field(default_factory=dict)
    """What the base's buffers were before the first tuning."""
    merged: dict[str, list[tuple[str, str, Tensor | None]]] = field(default_factory=dict)
    """Originals `(host, attribute, tensor)` replaced by each merged tuning, in the order of merging."""
    controllers: dict[str, Controllers] = field(default_factory=dict)


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
        raise ConfigError(f"the model has {what}; attached: {known or 'none'}.{nearest(name or '', known)}")
    return state
