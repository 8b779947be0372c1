"""`attach` puts a method into a backbone, `use` says which tuning runs; the only place that does surgery."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpeft.controllers import Controllers
from mmpeft.controllers.scores import Loss, default_loss
from mmpeft.errors import ConfigError, DataError, FreshHeadWarning, MovedBuffersWarning, Refused
from mmpeft.fresh_head import fresh_head
from mmpeft.host import CHILD, Plan, base_value, is_host, make_host, mark_route, module_at, unmake_host
from mmpeft.liveness import buffer_prints, moved_buffers
from mmpeft.methods.base import Method
from mmpeft.mixture import Mixture
from mmpeft.parts.base import Hook, Part, Placement
from mmpeft.parts.scaled import Scaled
from mmpeft.parts.statistics import MODE, frozen_statistics
from mmpeft.recompute import recompute_around
from mmpeft.routing import Grouped, Outside, RowPart, row_groups
from mmpeft.sites import sites
from mmpeft.state import STATE, State, state_of, state_with
from mmpeft.together import Entry, Route, Together, check_together, entries_of, names_of, weighted
from mmpeft.transaction import unchanged_on_error

if TYPE_CHECKING:
    from mmpeft.tuning import Tuning


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    data: Iterable[Any] | None = None,
    loss: Loss = default_loss,
    train_head: bool = False,
) -> Tuning:
    """Tune `model` by `method`: freeze the base and hang trainable parts under it; nothing else changes.

    A method that chooses by data what it trains (a Fisher mask) scores batches of `data` by `loss(model, batch)`
    first, by default the cross entropy of `(inputs, labels)` or the model's own loss of keyword arguments.

    `train_head` also trains the sites of role `head`, unless the method does: `method + LinearProbe()`. A head that
    looks as if nobody had trained it and that stays frozen gets a FreshHeadWarning.

    The model stays the same object, `isinstance` still holds and no state-dict key is renamed. Several
    tunings may live on one model under different names; the newest one is in use.

    After any exception, an interrupt included, the model is bit for bit what it was.

    Raises:
        SiteError: the model's class is unknown, or a selector matches nothing.
        Refused: the method cannot work on a selected site; the message has the reason.
        ConfigError: the name is taken or no identifier, or the argument is no method.
    """
    if not isinstance(method, Method):
        raise ConfigError(
            f"attach expects a method such as mmpeft.LoRA(rank=8), got {type(method).__name__}: {method!r}"
        )
    with unchanged_on_error(model):
        return _attach(model, method, name, data, loss, train_head)


def _attach(
    model: nn.Module, method: Method, name: str, data: Iterable[Any] | None, loss: Loss, train_head: bool
) -> Tuning:
    from mmpeft.tuning import Tuning

    if train_head and not method.trains_head:
        from mmpeft.methods.selective.linear_probe import LinearProbe

        method = method + LinearProbe()
    state = state_of(model) or State()
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"the name of a tuning must be a plain identifier, got {name!r}")
    if name in state.placements:
        raise ConfigError(f"a tuning named {name!r} is attached already; detach it or choose another name")
    if state.merged:
        raise ConfigError(f"tuning {next(iter(state.merged))!r} is merged into the base; unmerge it before attaching")
    if not method.decided:
        if method.needs_data and data is None:
            raise DataError(
                f"{type(method).__name__} chooses by data what trains: attach(model, method, data=loader), or attach "
                "the plan that method.resolve(model, loader) gives"
            )
        if state.placements:
            use(model, None)  # scores are those of the plain backbone
        method = method.resolve(model, data or (), loss)
    available = sites(model)
    placements = method.place(model, available)  # all checks happen here, before anything is changed
    for placement in placements:
        _check_home(model, placement)
    why = fresh_head(model, available, method, placements)
    if why:
        warnings.warn(why, FreshHeadWarning, stacklevel=3)
    if not state.placements:
        for parameter_name, parameter in base_parameters(model):
            state.trained[parameter_name] = parameter.requires_grad
            parameter.requires_grad_(False)
        state.buffers = buffer_prints(model)
        state.blocks = [site.path for site in available if site.role == "block"]
    _install(model, state, name, placements)
    state.methods[name], state.placements[name] = method, placements
    state.controllers[name] = Controllers(method.controllers(placements), _Replan(model))
    set_route(model, name)
    return Tuning(model, name)


def _check_home(model: nn.Module, placement: Placement) -> None:
    """Raise Refused for a container: what hangs under it would become one of its own entries."""
    module = module_at(model, placement.home)
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise Refused(
            f"{placement.home or 'the model'} is a {type(module).__name__} and cannot host parts; choose a module in it"
        )


def base_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Named parameters of the backbone alone."""
    return ((n, p) for n, p in model.named_parameters() if f".{CHILD}." not in f".{n}")


def base_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The same, those held in few bits in their true shape."""
    for name, _ in base_parameters(model):
        owner, _, own = name.rpartition(".")
        yield name, base_value(module_at(model, owner), own)


def _install(model: nn.Module, state: State, name: str, placements: list[Placement]) -> None:
    model.__dict__[STATE] = state
    reads: dict[str, set[str]] = {"": set()}
    for placement in placements:
        reads.setdefault(placement.home, set())
        for hook in placement.hooks:
            reads.setdefault(hook.path, set()).update({hook.name} if hook.kind == "read" else ())
    for path in frozen_statistics(model):
        reads.setdefault(path, set()).add(MODE)
    for path, names in reads.items():
        module = state.hosts.get(path) or module_at(model, path)
        make_host(module, frozenset(names))
        state.hosts[path] = module
    for placement in placements:
        home = state.hosts[placement.home]
        if not home.training:
            placement.part.eval()
        _child(_child(home, CHILD), name).add_module(placement.key, placement.part)


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
    """
    with unchanged_on_error(model):
        moved = _detach(model, name)
    if moved:
        warnings.warn(
            f"{len(moved)} buffers of the base have moved since the first tuning was attached (first: {moved[:3]}), so "
            f"the detached model is not what it was. {type(model).__name__} moves them itself in training mode: load "
            "the base again, or keep those modules in evaluation mode",
            MovedBuffersWarning,
            stacklevel=2,
        )


def _detach(model: nn.Module, name: str) -> list[str]:
    """As `detach`; gives the names of buffers that have moved."""
    state = state_with(model, name)
    if name in state.merged:
        raise ConfigError(f"tuning {name!r} is merged; unmerge() first, or keep the merged weights and drop the handle")
    del state.placements[name], state.methods[name], state.controllers[name]
    for host in state.hosts.values():
        under = host._modules.get(CHILD)
        if isinstance(under, nn.ModuleDict) and name in under:
            del under[name]
            if not under:
                del host._modules[CHILD]
    if state.placements:
        if name in names_of(state.route):
            state.route = None
        used = {path for ps in state.placements.values() for p in ps for path in (p.home, *(h.path for h in p.hooks))}
        used.update(frozen_statistics(model))
        for path in [p for p in state.hosts if p and p not in used and p not in state.blocks]:
            unmake_host(state.hosts.pop(path))
        set_route(model, state.route)
        return []
    moved = moved_buffers(model, state.buffers)
    for host in state.hosts.values():
        unmake_host(host)
    for parameter_name, parameter in base_parameters(model):
        parameter.requires_grad_(state.trained[parameter_name])
    del model.__dict__[STATE]
    return moved


# -- routes -------------------------------------------------------------------------------------------------


class use:
    """Choose the tuning that runs: a name, several `Together`, None for the plain backbone, or one for each row.

    Takes effect at once; as a context manager it restores the former choice on exit.

    Raises:
        ConfigError: an unknown name. Refused: tunings whose parts do not add up.
    """

    def __init__(self, model: nn.Module, which: Entry | Sequence[Entry]) -> None:
        state = state_with(model)
        route: Route = which if which is None or isinstance(which, str | Together) else tuple(which)
        for name in names_of(route):
            state_with(model, name)
        for entry in set(entries_of(route)):
            if isinstance(entry, Together):
                if not isinstance(entry, Mixture):
                    check_together({name: list(_hooks(state, name)) for name in entry.names})
                list(_hooks(state, entry))
        if route == ():
            raise ConfigError("use() got an empty list; give one name (or None) for each row of the batch")
        self.model, self.before = model, state.route
        set_route(model, route)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exc: object) -> None:
        set_route(self.model, self.before)


def set_route(model: nn.Module, route: Route) -> Route:
    """Plan every host for a route; return the former one."""
    state = state_with(model)
    before, state.route = state.route, route
    plans: dict[str, list[tuple[Hook, Part]]] = {}
    grouped = False
    if isinstance(route, tuple):
        grouped = not all(_rowwise(state, entry) for entry in set(route))
        if not grouped:
            for entry, rows in row_groups(route).items():
                for hook, part in _hooks(state, entry):
                    kind = "exit" if hook.kind == "call" else hook.kind
                    routed = RowPart(part, rows, len(route))
                    routed.order = part.order  # type: ignore[misc]
                    plans.setdefault(hook.path, []).append((Hook(hook.path, kind), routed))
    else:
        for hook, part in _hooks(state, route):
            plans.setdefault(hook.path, []).append((hook, part))
    for path, host in state.hosts.items():
        host.__dict__["_plan"] = _plan(host, plans.get(path, ()))
    if grouped and isinstance(route, tuple):
        for path in {hook.path for entry in set(route) for hook, _ in _hooks(state, entry)} - {""}:
            state.hosts[path].__dict__["_plan"] = Plan(around=Outside(path))
    for path in state.blocks:
        if state.recompute and not grouped:
            block = state.hosts.get(path) or module_at(model, path)
            if not is_host(block):
                make_host(block, frozenset())
                state.hosts[path] = block
            block.__dict__["_plan"].around = recompute_around(state.recompute)
    root = model.__dict__["_plan"]
    root.route = Grouped(route, _Setter(model)) if grouped and isinstance(route, tuple) else _Marked(model, route)
    return before


def _hooks(state: State, entry: Entry) -> Iterable[tuple[Hook, Part]]:
    if isinstance(entry, Mixture):
        yield from entry.hooks([_working(state, name) for name in entry.names])
    elif isinstance(entry, Together):
        for name, weight in zip(entry.names, entry.weights or (1.0,) * len(entry.names)):
            for placement in _working(state, name):
                part = weighted(placement.part, weight, name in entry.unit)
                yield from ((part.at(h) if isinstance(part, Scaled) else h, part) for h in placement.hooks)
    elif entry is not None:
        for placement in _working(state, entry):
            yield from ((hook, placement.part) for hook in placement.hooks)


def _working(state: State, name: str) -> list[Placement]:
    """The parts of a tuning that run: none of a merged one, and none that rests."""
    return [p for p in state.placements[name] if not p.part.resting] if name not in state.merged else []


def _rowwise(state: State, entry: Entry) -> bool:
    return all(part.rowwise and hook.kind != "read" for hook, part in _hooks(state, entry))


def _plan(host: nn.Module, hooks: Iterable[tuple[Hook, Part]]) -> Plan:
    ordered = sorted(hooks, key=lambda pair: pair[1].order)
    calls = [part for hook, part in ordered if hook.kind == "call"]
    reads: dict[str, tuple[Part, ...]] = {}
    for hook, part in reversed(ordered):
        if hook.kind == "read":
            reads[hook.name] = (*reads.get(hook.name, ()), part)
    enter = tuple(part for hook, part in ordered if hook.kind == "enter")
    leave = tuple(part for hook, part in reversed(ordered) if hook.kind == "exit")
    call = type(calls[0]).combine(calls, host, tuple(reads)) if calls else None
    wraps = tuple(part for hook, part in ordered if hook.kind == "around")
    return Plan(enter, leave, call, reads, wraps=wraps, alone=call is not None and not (enter or leave or wraps))


class _Setter:
    """`set_route` bound to a model, picklable and copied with it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, route: Route) -> Route:
        before = state_with(self.model).route
        if before is not route and before != route:
            set_route(self.model, route)
        return before


class _Replan:
    """Plans every host anew for the route that is set; picklable and copied with its model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> None:
        set_route(self.model, state_with(self.model).route)


class _Marked:
    """At the root: remember in the graph which route ran, for forward passes repeated during backward."""

    def __init__(self, model: nn.Module, route: Route) -> None:
        self.set_route, self.route = _Setter(model), route

    def __call__(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        y = run(*args, **kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return mark_route(y, self.set_route, self.route)
        return y
