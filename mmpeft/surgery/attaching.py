"""`attach` puts a method into a backbone, `detach` takes it out; the only place that does surgery."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from mmpeft.controllers import Controllers
from mmpeft.controllers.scores import Loss, default_loss
from mmpeft.errors import (
    ConfigError,
    DataError,
    FreshHeadWarning,
    MovedBuffersWarning,
    Refused,
    SiteError,
    StateError,
    noted,
)
from mmpeft.hosting.forward import Seat
from mmpeft.hosting.fused_layers import close_layers, open_layers
from mmpeft.hosting.host import base_value, make_host, unmake_host
from mmpeft.hosting.modules import CHILD, module_at, own_modules, own_parameters
from mmpeft.hosting.offload import check_stored, check_values, know
from mmpeft.hosting.quantized import guard, packs
from mmpeft.hosting.running import CHOICES, ChosenRoute, choose
from mmpeft.hosting.still import MODE, frozen_statistics
from mmpeft.methods.base import Method
from mmpeft.methods.former import place
from mmpeft.parts.base import Placement
from mmpeft.sites import Site, sites
from mmpeft.surgery.choice import use
from mmpeft.surgery.fresh_head import fresh_head
from mmpeft.surgery.liveness import buffer_prints, moved_buffers
from mmpeft.surgery.planning import by_weight, plan_route
from mmpeft.surgery.reach import reached
from mmpeft.surgery.state import STATE, State, state_of, state_with
from mmpeft.surgery.together import names_of
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.surgery.wrappers import check_order, watch_replacements
from mmpeft.types import Batch


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    data: Iterable[Batch] | None = None,
    loss: Loss = default_loss,
    run: bool = True,
    example: Batch = None,
    fresh: bool = False,
) -> None:
    """Freeze a model's base and hang a method's parts under it; nothing else changes, and nothing after an exception.

    `fresh` warns of a head that looks as if nobody had trained it: not where the tensors come from elsewhere, for it is
    then what it was when they were trained. `mmpeft.attach` has the rest.
    """
    check_order(model)
    check_stored(model)
    with unchanged_on_error(model), noted(f"attaching {name!r} to {type(model).__name__}: {method}"):
        state = state_of(model) or State(plan_route)
        _check_name(state, name)
        available = sites(model, example)
        method.check(model, available)
        method = _resolved(model, state, method, data, loss)
        placed = place(method, model, available)  # all checks happen here, before anything is changed
        placements = list(placed)
        for placement in placements:
            _check_home(model, placement)
        check_values(placements)
        why = fresh_head(model, available, method, placements) if fresh else None
        if why:
            warnings.warn(why, FreshHeadWarning, stacklevel=3)
        controllers = Controllers(placed.controllers, _Replan(model))
        with state.gate.alone(state):
            if not state.placements:
                _freeze(model, state, available)
            state.methods[name], state.placements[name] = method, placements
            state.controllers[name], state.bakes[name] = controllers, placed.bake
            know(state, placements)
            _install(model, state, name, placements)
            if run:
                state.default = ChosenRoute(state, name)
                if state.key in CHOICES.get():  # inside a `with use(...)`, until its end
                    choose(state, ChosenRoute(state, name))
            state.replan()
        if example is not None:
            _check_reached(model, name, placements, example)


def _check_reached(model: nn.Module, name: str, placements: list[Placement], example: Batch) -> None:
    """Raise SiteError where a pass goes past learned keys and values, or past all parts of one role.

    Of other parts some may rest for want of data: experts that no word is routed to.
    """
    with use(model, name):
        missed = reached(model, placements, example)
    entered = {placement.role for placement in placements if placement not in missed}
    dead = [placement for placement in missed if placement.role == "kv" or placement.role not in entered]
    if dead:
        where = dead[0].hooks[0].path if dead[0].hooks else dead[0].home
        raise SiteError(
            f"a pass of the example goes past {len(dead)} of {len(placements)} parts, which would train nothing "
            f"(first: {dead[0].role} at {where}): choose other sites, another attention implementation, or an example "
            "that uses them"
        )


def _check_name(state: State, name: str) -> None:
    """Raise ConfigError for a name that no new tuning can have."""
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"the name of a tuning must be a plain identifier, got {name!r}")
    if name in state.placements:
        raise StateError(f"a tuning named {name!r} is attached already; detach it or choose another name")
    if state.merged:
        raise StateError(f"tuning {next(iter(state.merged))!r} is merged into the base; unmerge it before attaching")


def _resolved(model: nn.Module, state: State, method: Method, data: Iterable[Batch] | None, loss: Loss) -> Method:
    """The method with all decided that data decide, by scores of the plain backbone."""
    if method.decided:
        return method
    if method.needs_data and data is None:
        raise DataError(
            f"{type(method).__name__} chooses by data what trains: attach(model, method, data=loader), or attach "
            "the plan that method.resolve(model, loader) gives"
        )
    if not state.placements:
        return method.resolve(model, data or (), loss)
    with use(model, None):
        return method.resolve(model, data or (), loss)


def _check_home(model: nn.Module, placement: Placement) -> None:
    """Raise Refused for a container: what hangs under it would become one of its own entries."""
    module = module_at(model, placement.home)
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise Refused(
            f"{placement.home or 'the model'} is a {type(module).__name__} and cannot host parts; choose a module in it"
        )


def base_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Named parameters of the backbone alone."""
    seen: set[int] = set()
    for name, parameter in own_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def base_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The same, those quantised in their true shape."""
    for name, _ in base_parameters(model):
        owner, _, own = name.rpartition(".")
        yield name, base_value(module_at(model, owner), own)


def _freeze(model: nn.Module, state: State, available: Iterable[Site]) -> None:
    for name, parameter in base_parameters(model):
        state.trained[name] = parameter.requires_grad
        parameter.requires_grad_(False)
    for _, module in own_modules(model):
        if packs(type(module)):
            guard(module)
    state.buffers = buffer_prints(model)
    state.blocks = [site.path for site in available if site.role == "block"]


def _install(model: nn.Module, state: State, name: str, placements: list[Placement]) -> None:
    watch_replacements()
    model.__dict__[STATE] = state
    reads: dict[str, set[str]] = {"": set()}
    for placement in placements:
        reads.setdefault(placement.home, set())
        for hook in placement.hooks:
            names = reads.setdefault(hook.path, set())
            if hook.kind == "read":
                names.add(hook.name)
            elif by_weight(hook, placement.part, state.hosts.get(hook.path) or module_at(model, hook.path)):
                names.add("weight")
    for path in frozen_statistics(model):
        reads.setdefault(path, set()).add(MODE)
    open_layers(model, reads, state.fused)
    for path, names in reads.items():
        host(model, state, path, frozenset(names))
    for placement in placements:
        home = state.hosts[placement.home]
        if not home.training:
            placement.part.eval()
        parts = _child(_child(home, CHILD), name)
        if placement.key in parts._modules:
            raise ConfigError(f"two parts at {placement.home} would be called {placement.key!r}, one lost on saving")
        parts.add_module(placement.key, placement.part)


def host(model: nn.Module, state: State, path: str, reads: frozenset[str] = frozenset()) -> None:
    """Make a module a host, or let parts answer for more of its attributes."""
    module = state.hosts.get(path) or module_at(model, path)
    state.seats += 1
    make_host(module, Seat(state, state.seats, path), reads)
    state.hosts[path] = module


def _child(module: nn.Module, name: str) -> nn.Module:
    """The `ModuleDict` of that name under a module, made if missing."""
    if name not in module._modules:
        module.add_module(name, nn.ModuleDict())
    child = module._modules[name]
    assert child is not None
    return child


def detach(model: nn.Module, name: str) -> None:
    """Remove a tuning: original classes, keys and requires_grad come back with the last one.

    Warns by name of buffers of the base that have moved since: the model is then not what it was.

    Raises:
        Refused: another thread, task or generator is inside `with use(...)` of it.
        ConfigError: it is merged.
    """
    state = state_with(model, name)
    if name in state.merged:
        raise StateError(f"tuning {name!r} is merged; unmerge() first, or keep the merged weights and drop the handle")
    own = CHOICES.get().get(state.key)
    for choice in list(state.live):
        if choice.entered and choice is not own and name in names_of(choice.route):
            raise Refused(f"another thread, task or generator is inside `with use(...)` of {name!r}; leave it first")
    with unchanged_on_error(model), state.gate.alone(state):
        moved = _detach(model, state, name)
    if moved:
        warnings.warn(
            f"{len(moved)} buffers of the base have moved since the first tuning was attached (first: {moved[:3]}), so "
            f"the detached model is not what it was. {type(model).__name__} moves them itself in training mode: load "
            "the base again, or keep those modules in evaluation mode",
            MovedBuffersWarning,
            stacklevel=2,
        )


def _detach(model: nn.Module, state: State, name: str) -> list[str]:
    """As `detach`; gives the names of buffers that have moved."""
    del state.placements[name], state.methods[name], state.controllers[name], state.bakes[name]
    for choice in list(state.live):
        if name in names_of(choice.route):
            choice.route = None
    for module in state.hosts.values():
        under = module._modules.get(CHILD)
        if isinstance(under, nn.ModuleDict) and name in under:
            del under[name]
            if not under:
                del module._modules[CHILD]
    if state.placements:
        left = [p for placements in state.placements.values() for p in placements]
        used = {path for p in left for path in (p.home, *(hook.path for hook in p.hooks))}
        used.update(("", *state.blocks, *frozen_statistics(model)))
        for path in [path for path in state.hosts if path not in used]:
            unmake_host(state.hosts.pop(path))
        state.replan()
        return []
    close_layers(model, state.fused)
    moved = moved_buffers(model, state.buffers)
    for module in state.hosts.values():
        unmake_host(module)
    for parameter_name, parameter in base_parameters(model):
        parameter.requires_grad_(state.trained.get(parameter_name, True))  # those of later parametrisations
    del model.__dict__[STATE]
    return moved


class _Replan:
    """Plans every host anew; picklable and copied with its model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> None:
        with state_with(self.model).changing():
            pass
