"""What any tuning of any model must keep, one function an invariant, in the order of a user's session."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import nn

from mmpeft.combine.interpolate import interpolate
from mmpeft.combine.strength import strength
from mmpeft.errors import Refused
from mmpeft.hosting.quantized import dense
from mmpeft.parts.rescale import Rescale
from mmpeft.surgery.attaching import base_parameters
from mmpeft.surgery.choice import use
from mmpeft.surgery.state import state_with
from mmpeft.testing.session import Broken, InvariantError, NotApplicable, Session, weigh
from mmpeft.tuning import load, tunings

T = TypeVar("T")
FAR, NEAR = 0.05, 0.02
"""How far tensors are moved from their start; merging is linear near it."""


@dataclass(frozen=True)
class Invariant:
    """One thing that must hold: its name, its line of purpose, and how far the tensors are moved before."""

    function: Callable[[Session], None]
    by: float
    always: bool
    """Whether `check` tries it unasked."""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def purpose(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def __call__(self, session: Session) -> None:
        """Try it.

        Raises:
            InvariantError: it does not hold. NotApplicable: it says nothing about this method on this model.
        """
        session.move(self.by)
        try:
            self.function(session)
        except NotApplicable:
            raise
        except Broken as found:
            raise InvariantError(
                self.name, session.given, found.where, found.expected, found.received
            ) from found.__cause__
        except Exception as error:
            where, received = type(session.model).__name__, f"{type(error).__name__}: {error}"
            raise InvariantError(self.name, session.given, where, "no error", received) from error


INVARIANTS: dict[str, Invariant] = {}


def _invariant(by: float = FAR, always: bool = True) -> Callable[[Callable[[Session], None]], Invariant]:
    def add(function: Callable[[Session], None]) -> Invariant:
        return INVARIANTS.setdefault(function.__name__, Invariant(function, by, always))

    return add


@_invariant(by=0.0)
def starts_as_the_base(session: Session) -> None:
    """The same object and class, no key renamed, and the same answer unless the method says otherwise."""
    if type(session.model).__name__ != session.kind.__name__ or not isinstance(session.model, session.kind):
        session.broken("the model", f"a {session.kind.__name__}", type(session.model).__name__)
    gone = sorted(set(session.original) - set(session.model.state_dict()))
    if gone:
        session.broken(gone[0], "every key of the base in the state dict", f"{len(gone)} keys fewer")
    session.same(session.after_deciding, session.plain, "the base as it was before the method chose what trains")
    if session.given.identity:
        session.same(session.start, session.plain, "the base, for the method says identity=True")
    elif torch.equal(session.start, session.plain):
        session.broken("the model's answer", "another one than the base's (identity=False)", "the base's own")


@_invariant(by=0.0)
def trains_its_own_tensors_alone(session: Session) -> None:
    """What requires a gradient is the tuning's, and as many numbers as the method counts in closed form."""
    own = {id(parameter) for parameter in session.tuning.parameters()}
    for name, parameter in session.model.named_parameters():
        if parameter.requires_grad != (id(parameter) in own):
            session.broken(name, f"requires_grad={id(parameter) in own}", f"requires_grad={parameter.requires_grad}")
    total = sum(parameter.numel() for parameter in session.tuning.parameters())
    for where, number in (("method.count", session.count), ("tuning.report()", session.tuning.report().trainable)):
        if number != total:
            session.broken(where, f"the {total} numbers that train", number)


@_invariant(by=0.0)
def learns_and_moves_nothing_else(session: Session) -> None:
    """Every tensor gets a gradient within two steps, AdamW with decay moves no frozen one, and no trace is left."""
    alive = session.tuning.liveness(session.batch)
    if alive.moved:
        session.broken(alive.moved[0], "frozen tensors where they were", f"{len(alive.moved)} that moved")
    blind = not (session.given.decided or session.given.needs_data)  # drawn without data, it may hit unused entries
    if len(alive.dead) > (0.1 * len(alive.pulses) if blind else 0):
        session.broken(alive.dead[0], "a gradient for every tensor", f"{len(alive.dead)} without one: {alive.dead[:3]}")
    session.same(session.answer(), session.start, "the answer from before the check")


@_invariant()
def off_is_the_base(session: Session) -> None:
    """Moved tensors change the answer; without the tuning it is the base's."""
    if not any(parameter.numel() for parameter in session.tuning.parameters()):
        raise NotApplicable("the method has no trainable tensor")
    if torch.allclose(session.tuned, session.plain, atol=1e-4):
        session.broken("the model's answer", "another one than the base's once tensors are moved", "the base's own")
    with use(session.model, None):
        session.same(session.answer(), session.plain, "the base")


@_invariant()
def rows_have_their_own_route(session: Session) -> None:
    """A batch whose rows take turns between the tuning and the base equals separate runs."""
    session.halves()
    rows = [session.tuning.name if i % 2 == 0 else None for i in range(len(session.plain))]
    with use(session.model, rows):
        mixed = session.answer()
    session.close(mixed[0::2], session.tuned[0::2], "rows of the tuning", "even rows", atol=2e-6, rtol=1e-5)
    session.close(mixed[1::2], session.plain[1::2], "rows of the base", "odd rows", atol=2e-6, rtol=1e-5)


@_invariant()
def state_dict_goes_round(session: Session) -> None:
    """The model's own state dict holds all of the tuning: loaded back, it undoes what happened to it."""
    _unless_the_base_fails(session, lambda model: model.load_state_dict(model.state_dict()))
    held = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    expected = session.tuned
    session.move(2 * FAR)
    session.model.load_state_dict(held)
    session.same(session.answer(), expected, "the answer from before tensors moved on")
    session.move(FAR)


@_invariant()
def saved_and_loaded(session: Session) -> None:
    """The file holds the trainable bytes and a header; in another model of its kind it answers the same."""
    with TemporaryDirectory() as folder:
        session.tuning.save(folder)
        (file,) = Path(folder).glob("*.safetensors")
        kept = session.tuning.state_dict().values()
        most = sum(t.numel() * t.element_size() for t in kept) + 200 * len(kept) + 512
        if file.stat().st_size > most:
            session.broken("the adapter's file", f"{most} bytes at most", file.stat().st_size)
        other = session.make()
        load(other, folder)
        session.same(session.answer(other), session.tuned, "what was saved")


@_invariant()
def copies_share_nothing(session: Session) -> None:
    """A deep copy answers the same, and its tensors are its own."""
    _twin(session, copy.deepcopy)


@_invariant()
def pickles_go_round(session: Session) -> None:
    """A pickle of the model answers the same, and its tensors are its own."""
    _twin(session, lambda model: pickle.loads(pickle.dumps(model)))


def _unless_the_base_fails(session: Session, what: Callable[[nn.Module], T]) -> T:
    """`what` of the tuned model; NotApplicable where it fails on the base just as well."""
    try:
        return what(session.model)
    except Exception as error:
        base = session.make()
        session.answer(base)  # some keep more once they have run
        try:
            what(base)
        except Exception:
            reason = f"{type(error).__name__}: {error}"
            raise NotApplicable(f"the base itself does not survive it: {reason}") from error
        raise


def _twin(session: Session, way: Callable[[nn.Module], nn.Module]) -> None:
    expected = session.tuned
    twin = _unless_the_base_fails(session, way)
    for (name, mine), (_, its) in zip(session.model.named_parameters(), twin.named_parameters()):
        if type(mine) is not type(its):  # the library that holds it so has not kept it
            raise NotApplicable(f"{name} of the base comes back as a {type(its).__name__}")
    received = session.answer(twin)
    session.same(received, expected, "the original's answer", "the copy's answer")
    (handle,) = tunings(twin).values()
    before = {name: tensor.detach().clone() for name, tensor in session.tuning.named_parameters()}
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1.0)
    for name, tensor in session.tuning.named_parameters():
        session.same(tensor, before[name], "no tensor shared with the copy", name)
    if before and torch.equal(session.answer(twin), expected):
        session.broken("the copy's answer", "another one once the copy's tensors are moved", "the original's")


@_invariant()
def close_in_bfloat16(session: Session) -> None:
    """Under autocast the answer is near, with finite gradients."""
    device = session.plain.device.type
    with torch.autocast(device, torch.bfloat16):
        low = session.run()
        found = session.gradients(low.float().square().sum())
    for name, gradient in found.items():
        if not torch.isfinite(gradient).all():
            session.broken(name, "a finite gradient", "one that is not")
    off, scale = (low.float() - session.tuned).norm(), session.tuned.norm()
    if not off < 0.3 * scale:
        session.broken("the model's answer", f"within 0.3 of {float(scale):.2g}", f"{float(off):.2g} away")


@_invariant()
def gradients_accumulate(session: Session) -> None:
    """Those of a batch equal the sum over its halves."""
    halves = session.halves()
    whole = session.gradients(session.run().square().sum())
    parts = [session.gradients(session.run(batch=half).square().sum()) for half in halves]
    for name, gradient in whole.items():
        added = sum((part[name] for part in parts), torch.zeros_like(gradient))
        session.close(added, gradient, "the gradient of the whole batch", name, atol=1e-4, rtol=1e-3)


@_invariant()
def recomputes_the_same_gradients(session: Session) -> None:
    """With blocks computed again, by every mode, and with another route set between forward and backward."""
    if not session.tuning._state.blocks:
        raise NotApplicable("the model names no blocks")
    torch.manual_seed(0)
    plain = session.gradients(weigh(session.run()))
    for mode in ("block", "pointwise"):
        session.tuning.recompute = mode
        torch.manual_seed(0)
        _agree(session, session.gradients(weigh(session.run())), plain, f"with recompute={mode!r}")
    session.tuning.recompute = "block"
    loss = weigh(session.run())
    with use(session.model, None):
        late = session.gradients(loss)
        if state_with(session.model).route is not None:
            session.broken("the route", "the one set around the backward pass", "another one")
    session.tuning.recompute = None
    _agree(session, late, plain, "with another route set behind the forward pass")


def _agree(session: Session, found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], when: str) -> None:
    for name, gradient in found.items():
        session.close(gradient, plain[name], f"the same gradient {when}", name, atol=1e-5, rtol=1e-4)


@_invariant(by=NEAR)
def merges_into_what_runs(session: Session) -> None:
    """Merged weights answer as the tuning does, and un-merging restores every bit; what cannot merge says so."""
    expected = session.tuned
    bits = {name: parameter.clone() for name, parameter in base_parameters(session.model)}
    try:
        session.tuning.merge()
    except Refused as refusal:
        session.same(session.answer(), expected, "what ran before a merge that was refused")
        raise NotApplicable(str(refusal)) from None
    if not session.given.mergeable:
        session.tuning.unmerge()
        session.broken("merge()", "a refusal, for the method says mergeable=False", "none")
    session.close(session.answer(), expected, "the tuning's answer from merged weights", atol=1e-5, rtol=1e-5)
    session.tuning.unmerge()
    session.same(session.answer(), expected, "the answer from before merging")
    for name, parameter in base_parameters(session.model):
        session.same(parameter, bits[name], "the tensor from before merging", name)


@_invariant(by=NEAR)
def strength_lies_between(session: Session) -> None:
    """At half strength the answer is neither off nor on, and half-way to the merged weights; or it says it has none.

    Half-way is to first order where a gain and a bias meet in one layer.
    """
    tuning, tuned = session.tuning, session.tuned
    if not all(placement.part.scalable for placement in tuning.placements):
        try:
            strength(tuning, 0.5)
        except Refused as refusal:
            raise NotApplicable(str(refusal)) from None
        session.broken("strength(tuning, 0.5)", "a refusal, for a part says scalable=False", "none")
    with strength(tuning, 0.5):
        half = session.answer()
    session.same(session.answer(), tuned, "full strength again")
    if not torch.isfinite(half).all() or torch.equal(half, tuned):
        session.broken("half strength", "finite numbers, others than at full strength", "none such")
    try:
        with interpolate(tuning, 0.5):
            between = session.answer()
    except Refused:
        return
    scaled = {p.home for p in tuning.placements if isinstance(p.part, Rescale)}
    if any(p.home in scaled and not isinstance(p.part, Rescale) for p in tuning.placements):
        if not (between - half).norm() < 0.05 * (tuned - session.plain).norm():
            session.broken("half strength", "half-way to the merged weights, to first order", "something else")
    else:
        session.close(between, half, "half strength", "half-way to the merged weights", atol=1e-5, rtol=1e-5)


@_invariant(always=False)
def compiles_as_one_graph(session: Session) -> None:
    """Dynamo traces the tuned model without a break; it computes the same and every tensor gets a gradient."""
    torch._dynamo.reset()
    compiled = torch.compile(session.model, fullgraph=True, backend="aot_eager")
    answer = session.read(compiled(**session.batch) if isinstance(session.batch, dict) else compiled(session.batch))
    session.close(answer, session.run(), "the answer without compilation", atol=1e-5, rtol=1e-5)
    answer.square().mean().backward()
    for name, parameter in session.tuning.named_parameters():
        if parameter.grad is None:
            session.broken(name, "a gradient from the compiled model", "none")
        parameter.grad = None


@_invariant()
def detaches_without_a_trace(session: Session) -> None:
    """The original state dict, class and answer come back; ends the session."""
    session.tuning.detach()
    if type(session.model) is not session.kind:
        session.broken("the model's class", session.kind.__name__, type(session.model).__name__)
    state = session.model.state_dict()
    if list(state) != list(session.original):
        session.broken("the state dict", "its original keys in their order", f"{len(state)} keys")
    for name, tensor in state.items():
        if not torch.equal(dense(tensor), dense(session.original[name])):
            session.broken(name, "the original bits", "others")
    session.same(session.answer(), session.plain, "the base")
