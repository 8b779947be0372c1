"""What every host of a model does under a route."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mmpeft.host import SEAT, Plan, Seat, is_patched
from mmpeft.mixture import Mixture
from mmpeft.parts.base import Hook, Part, Placement
from mmpeft.parts.scaled import Scaled
from mmpeft.recompute import recompute_around
from mmpeft.routing import Grouped, RowPart, row_groups
from mmpeft.running import Planned
from mmpeft.state import State, state_with
from mmpeft.together import Entry, Route, Together, check_together, entries_of, names_of, weighted

Hooks = dict[str, list[tuple[Hook, Part]]]


def check_route(model: nn.Module, route: Route) -> None:
    """Raise ConfigError for a name that no tuning has, Refused for tunings whose parts do not add up."""
    state = state_with(model)
    for name in names_of(route):
        state_with(model, name)
    for entry in set(entries_of(route)):
        if isinstance(entry, Together):
            if not isinstance(entry, Mixture):
                check_together({name: list(hooks_of(state, name)) for name in entry.names})
            list(hooks_of(state, entry))


def plan_route(state: State, route: Route) -> Planned:
    """Plan every host."""
    check_route(state.hosts[""], route)
    hooks: Hooks = {}
    grouped = None
    if isinstance(route, tuple):
        if all(rowwise(state, entry) for entry in set(route)):
            hooks = _by_row(state, route)
        else:
            grouped = Grouped(route, state.plan)
            for entry in set(route):  # these are the hosts that may not be run by themselves
                for hook, part in hooks_of(state, entry):
                    hooks.setdefault(hook.path, []).append((hook, part))
    else:
        for hook, part in hooks_of(state, route):
            hooks.setdefault(hook.path, []).append((hook, part))
    plans = {path: plan_host(state.hosts[path], own) for path, own in hooks.items()}
    if state.recompute and grouped is None:
        for path in state.blocks:
            plans.setdefault(path, Plan()).around = recompute_around(state.recompute)
    return _seated(state, route, plans, grouped)


def _seated(state: State, route: Route, plans: dict[str, Plan], grouped: Grouped | None) -> Planned:
    number = state.number(route)
    found = {}
    for path, host in state.hosts.items():
        seat: Seat = host.__dict__[SEAT]
        plan = plans.get(path)
        if plan is not None:
            found[seat.index] = plan
        if number is not None:
            seat.plans[number] = plan or Plan()
    return Planned(state, route, found, grouped, number)


def _by_row(state: State, route: tuple[Entry, ...]) -> Hooks:
    hooks: Hooks = {}
    for entry, rows in row_groups(route).items():
        for hook, part in hooks_of(state, entry):
            kind = "exit" if hook.kind == "call" else hook.kind
            routed = RowPart(part, rows, len(route))
            routed.order = part.order  # type: ignore[misc]
            hooks.setdefault(hook.path, []).append((Hook(hook.path, kind), routed))
    return hooks


def hooks_of(state: State, entry: Entry) -> Iterable[tuple[Hook, Part]]:
    """Every part that one entry of a route runs, and where it enters."""
    if isinstance(entry, Mixture):
        yield from entry.hooks([working(state, name) for name in entry.names])
    elif isinstance(entry, Together):
        for name, weight in zip(entry.names, entry.weights or (1.0,) * len(entry.names)):
            for placement in working(state, name):
                part = weighted(placement.part, weight, name in entry.unit)
                yield from ((part.at(h) if isinstance(part, Scaled) else h, part) for h in placement.hooks)
    elif entry is not None:
        for placement in working(state, entry):
            yield from ((hook, placement.part) for hook in placement.hooks)


def working(state: State, name: str) -> list[Placement]:
    """The parts of a tuning that run: none of a merged one, and none that rests."""
    return [p for p in state.placements[name] if not p.part.resting] if name not in state.merged else []


def rowwise(state: State, entry: Entry) -> bool:
    """Whether every part of an entry can act on some rows of a batch alone."""
    return all(part.rowwise and hook.kind != "read" for hook, part in hooks_of(state, entry))


def plan_host(host: nn.Module, hooks: Iterable[tuple[Hook, Part]]) -> Plan:
    """What one host does with the parts that enter there."""
    ordered = sorted(hooks, key=lambda pair: pair[1].order)
    patched = is_patched(host)
    calls = [part for hook, part in ordered if hook.kind == "call" and not patched]
    reads: dict[str, tuple[Part, ...]] = {}
    for hook, part in reversed(ordered):
        if hook.kind == "read" or (hook.kind == "call" and patched):
            name = hook.name or "weight"  # a forward that somebody wrote may do anything with it
            reads[name] = (*reads.get(name, ()), part)
    enter = tuple(part for hook, part in ordered if hook.kind == "enter")
    leave = tuple(part for hook, part in reversed(ordered) if hook.kind == "exit")
    call = type(calls[0]).combine(calls, host, tuple(reads)) if calls else None
    wraps = tuple(part for hook, part in ordered if hook.kind == "around")
    return Plan(enter, leave, call, reads, wraps, alone=call is not None and not (enter or leave or wraps))
