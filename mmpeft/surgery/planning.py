"""What every host of a model does under a route."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mmpeft.hosting.forward import HostPlan, Seat
from mmpeft.hosting.host import multiplies
from mmpeft.hosting.modules import SEAT
from mmpeft.hosting.recompute import recompute_around
from mmpeft.hosting.running import Planned
from mmpeft.parts.answered import answered
from mmpeft.parts.base import Hook, Part, Placement
from mmpeft.parts.delta import Delta
from mmpeft.parts.scaled import Scaled
from mmpeft.parts.slots import Slots, slotted
from mmpeft.surgery.mixture import Mixture
from mmpeft.surgery.routing import RowPart, Rows, row_groups
from mmpeft.surgery.state import State, state_with
from mmpeft.surgery.together import Entry, Route, Together, check_together, entries_of, names_of, weighted

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
    if isinstance(route, tuple):
        return _plan_rows(state, route)
    hooks: Hooks = {}
    for hook, part in hooks_of(state, route):
        hooks.setdefault(hook.path, []).append((hook, part))
    plans = {path: plan_host(state.hosts[path], own) for path, own in hooks.items()}
    _recompute(state, plans)
    number = state.number(route)
    found = {}
    for path, host in state.hosts.items():
        seat: Seat = host.__dict__[SEAT]
        plan = plans.get(path)
        if plan is not None:
            found[seat.index] = plan
        if number is not None:
            seat.plans[number] = plan or HostPlan()
    return Planned(state, route, found, number)


def _recompute(state: State, plans: dict[str, HostPlan]) -> None:
    if state.recompute is None:
        return
    for path in state.blocks:
        plans.setdefault(path, HostPlan()).around = recompute_around(state.recompute)


def _plan_rows(state: State, route: tuple[Entry, ...]) -> Planned:
    """In place where every part can act on some rows alone; the whole model once for each entry elsewhere."""
    in_place = all(rowwise(state, entry) for entry in set(route))
    hooks: Hooks = {}
    slots = _slots(state, route) if in_place else {}
    for entry, rows in row_groups(route).items():
        for hook, part in hooks_of(state, entry):
            if hook.path in slots:
                hooks.setdefault(hook.path, [])
                continue
            kind = "exit" if hook.kind == "call" else hook.kind
            routed = RowPart(part, rows, len(route))
            routed.order = part.order
            hooks.setdefault(hook.path, []).append((Hook(hook.path, kind), routed))
    seats = {path: state.hosts[path].__dict__[SEAT].index for path in hooks}
    rows_at_root = Rows(state, route, tuple(sorted(seats.values())), in_place)
    if not in_place:
        return Planned(state, route, dict.fromkeys(seats.values(), HostPlan()), rows=rows_at_root, whole=True)
    plans = {path: slots.get(path) or plan_host(state.hosts[path], own) for path, own in hooks.items()}
    _recompute(state, plans)
    seated = {state.hosts[path].__dict__[SEAT].index: plan for path, plan in plans.items()}
    found = Planned(state, route, seated, rows=rows_at_root)
    if slots:
        number = {name: i for i, name in enumerate(state.placements, 1)}
        found.slots = torch.tensor([number.get(name, 0) if isinstance(name, str) else 0 for name in route])
    return found


def _slots(state: State, route: tuple[Entry, ...]) -> dict[str, HostPlan]:
    """Plans of hosts where all that the route runs are low-rank updates of one product; they serve every pattern."""
    if not all(entry is None or isinstance(entry, str) for entry in route):
        return {}
    if state.slots is None:
        found: dict[str, dict[str, list[Delta]]] = {}
        others: set[str] = set()
        for name in state.placements:
            for hook, part in hooks_of(state, name):
                shared = hook.kind == "call" and slotted(part) and not by_weight(hook, part, state.hosts[hook.path])
                if shared and isinstance(part, Delta):
                    found.setdefault(hook.path, {}).setdefault(name, []).append(part)
                else:
                    others.add(hook.path)
        state.slots = {path: HostPlan(call=Slots(own), alone=True) for path, own in found.items() if path not in others}
    return state.slots


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


def by_weight(hook: Hook, part: Part, host: nn.Module) -> bool:
    """Whether an update answers for a host's weight where it would replace or follow the plain product.

    A forward that is no plain product, or that somebody wrote, may do anything with the weight.
    """
    return hook.kind in ("call", "exit") and isinstance(part, Delta) and not multiplies(host)


def plan_host(host: nn.Module, hooks: Iterable[tuple[Hook, Part]]) -> HostPlan:
    """What one host does with the parts that enter there."""
    ordered = sorted(hooks, key=lambda pair: pair[1].order)
    weighing = {id(part) for hook, part in ordered if by_weight(hook, part, host)}
    calls = [part for hook, part in ordered if hook.kind == "call" and id(part) not in weighing]
    reads: dict[str, tuple[Part, ...]] = {}
    for hook, part in reversed(ordered):
        if hook.kind == "read" or id(part) in weighing:
            name = hook.name or "weight"
            reads[name] = (*reads.get(name, ()), part)
    enter = tuple(part for hook, part in ordered if hook.kind == "enter")
    leave = tuple(part for hook, part in reversed(ordered) if hook.kind == "exit" and id(part) not in weighing)
    call = type(calls[0]).combine(calls, host, tuple(reads)) if calls else None
    wraps = tuple(part for hook, part in ordered if hook.kind == "around")
    return HostPlan(
        enter, leave, call, reads, answered, wraps, alone=call is not None and not (enter or leave or wraps)
    )
