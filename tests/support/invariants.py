"""What any tuning of any model must keep, one function an invariant, in the order of a user's session."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmpeft
from mmpeft.errors import Refused
from mmpeft.hosting.few_bits import dense
from mmpeft.methods import Method
from mmpeft.parts import Rescale
from mmpeft.sites import sites
from mmpeft.surgery.attaching import base_parameters
from mmpeft.surgery.state import state_of
from tests.matrix.cells import decided
from tests.matrix.example import BATCH, Example


class Session:
    """A model of `make` that a method has just been attached to, and what is known of both from before."""

    def __init__(self, make: Callable[[], Example], method: Method) -> None:
        self.make, self.given = make, method
        self.example = make()
        self.model = self.example.model
        self.plain = self.example.answer()
        self.kind = type(self.model)
        self.original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        available = sites(self.model)
        self.method = decided(self.example, method)
        if not method.decided:
            assert torch.equal(self.example.answer(), self.plain), "deciding has changed the model"
        self.expected = self.method.count(self.model, available)
        self.tuning = mmpeft.attach(self.model, self.method)
        self.start = self.example.answer()

    def perturb(self) -> None:
        """Away from the start; the answer from then on is `tuned`."""
        perturb(self.tuning)
        self.tuned = self.example.answer()
        assert not torch.allclose(self.tuned, self.plain, atol=1e-4), "the perturbed tuning has no effect"


def identity_at_init_or_declared(session: Session) -> None:
    """The same object and class, keys kept, and the same answer unless the method says otherwise."""
    assert isinstance(session.model, session.kind)
    assert set(session.original) <= set(session.model.state_dict())
    difference = (session.start - session.plain).abs().max()
    assert (difference == 0) == session.given.identity, f"max difference {difference}"


def exact_trainable_set(session: Session) -> None:
    """What trains is the tuning's and as many as the closed form says."""
    tuning = session.tuning
    own = {id(p) for p in tuning.parameters()}
    assert {id(p) for p in session.model.parameters() if p.requires_grad} == own
    assert sum(p.numel() for p in tuning.parameters()) == session.expected == tuning.report().trainable


def alive_without_drift(session: Session) -> None:
    """Every tensor gets a gradient, AdamW with weight decay moves no frozen one, and the check leaves no trace."""
    alive = session.tuning.liveness(session.example.batch)
    # a mask drawn without data may hit unused entries
    blind = not (session.given.decided or session.given.needs_data)
    assert not alive.moved
    assert len(alive.dead) <= (0.1 * len(alive.pulses) if blind else 0), alive.dead
    assert torch.equal(session.example.answer(), session.start)


def mixed_batch_equals_separate_runs(session: Session) -> None:
    """Each row under its own route, and none of the tuning where the plain backbone is asked for."""
    rows = ["default" if i % 2 == 0 else None for i in range(BATCH)]
    with mmpeft.use(session.model, rows):
        mixed = session.example.answer()
    torch.testing.assert_close(mixed[0::2], session.tuned[0::2], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1::2], session.plain[1::2], atol=2e-6, rtol=1e-5)
    with mmpeft.use(session.model, None):
        assert torch.equal(session.example.answer(), session.plain)


def saved_and_loaded(session: Session, folder: Path) -> None:
    """The file holds the trainable bytes (adapters that a fusion froze too) and a header."""
    session.tuning.save(folder)
    (file,) = folder.glob("*.safetensors")
    kept = session.tuning.state_dict().values()
    assert file.stat().st_size <= sum(t.numel() * t.element_size() for t in kept) + 200 * len(kept) + 512
    other = session.make()
    mmpeft.load(other.model, folder)
    assert torch.equal(other.answer(), session.tuned)


def detached_without_a_trace(session: Session) -> None:
    """The original state dict, class and answer; ends the session."""
    session.tuning.detach()
    model, original = session.model, session.original
    assert type(model) is session.kind
    assert list(model.state_dict()) == list(original)
    assert all(_same(v, original[k]) for k, v in model.state_dict().items())
    assert torch.equal(session.example.answer(), session.plain)


def merged_and_unmerged(example: Example, tuning: mmpeft.Tuning, base: Tensor, refusal: str | None) -> None:
    """Merge equals the tuned forward, un-merge restores the bits; what cannot merge says why.

    Half the strength is half-way to the merged weights, to first order where a gain and a bias meet in one layer, and
    for other methods something between off and on; what has no strength says so.
    """
    tuned, bits = example.answer(), {n: p.clone() for n, p in base_parameters(example.model)}
    if refusal:
        with pytest.raises(Refused, match=refusal):
            tuning.merge()
        assert torch.equal(example.answer(), tuned)
        if all(placement.part.scalable for placement in tuning.placements):
            with mmpeft.strength(tuning, 0.5):
                half = example.answer()
            assert torch.isfinite(half).all()
            assert not torch.equal(half, tuned)
        else:
            with pytest.raises(Refused, match="no strength between"):
                mmpeft.strength(tuning, 0.5)
        assert torch.equal(example.answer(), tuned)
        return
    with mmpeft.strength(tuning, 0.5):
        half = example.answer()
    scaled = {p.home for p in tuning.placements if isinstance(p.part, Rescale)}
    meeting = any(p.home in scaled and not isinstance(p.part, Rescale) for p in tuning.placements)
    with mmpeft.interpolate(tuning, 0.5):
        between = example.answer()
    if meeting:
        assert (between - half).norm() < 0.05 * (tuned - base).norm()
    else:
        torch.testing.assert_close(between, half, atol=1e-5, rtol=1e-5)
    tuning.merge()
    torch.testing.assert_close(example.answer(), tuned, atol=1e-5, rtol=1e-5)
    tuning.unmerge()
    assert torch.equal(example.answer(), tuned)
    assert all(_same(p, bits[n]) for n, p in base_parameters(example.model))


def recomputed_with_the_same_gradients(example: Example, tuning: mmpeft.Tuning) -> None:
    """By every mode, and with another route set between forward and backward."""
    plain = _grads(tuning, example)
    for mode in ("block", "pointwise"):
        tuning.recompute = mode
        for name, gradient in _grads(tuning, example).items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4, msg=f"{mode}: {name}")
    tuning.recompute = "block"
    y = example()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    with mmpeft.use(example.model, None):
        late = _grad((y * weights).sum(), tuning)
        assert state_of(example.model).route is None
    for name, gradient in zip(plain, late):
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4, msg=f"switched: {name}")


def copied(example: Example, pickles: bool) -> None:
    """By deepcopy and, where the base itself survives it, by pickle: the same answer, and nothing shared."""
    y = example.answer()
    pickled = (pickle.loads(pickle.dumps(example.model)),) if pickles else ()
    for twin in (copy.deepcopy(example.model), *pickled):
        assert torch.equal(example.answer(twin), y)
        (handle,) = mmpeft.tunings(twin).values()
        with torch.no_grad():
            next(handle.parameters()).add_(1.0)
        assert torch.equal(example.answer(), y), "the copy shares tensors with the original"


def close_in_bfloat16(example: Example, tuning: mmpeft.Tuning) -> None:
    """Under autocast, with finite gradients."""
    y = example.answer()
    with torch.autocast("cpu", torch.bfloat16):
        low = example()
        grads = _grad(low.float().square().sum(), tuning)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (low.float() - y).norm() < 0.3 * y.norm()


def gradients_accumulate(example: Example, tuning: mmpeft.Tuning) -> None:
    """Those of a batch equal the sum over its halves."""
    whole = _grad(example().square().sum(), tuning)
    halves = [_grad(example(batch=half).square().sum(), tuning) for half in example.halves()]
    for full, *parts in zip(whole, *halves):
        torch.testing.assert_close(sum(parts), full, atol=1e-4, rtol=1e-3)


def compiled_as_one_graph(example: Example, tuning: mmpeft.Tuning) -> None:
    """Dynamo traces the tuned model without a break; it computes the same and every tensor gets a gradient."""
    torch._dynamo.reset()
    compiled = torch.compile(example.model, fullgraph=True, backend="aot_eager")
    y = example(compiled)
    torch.testing.assert_close(y, example(), atol=1e-5, rtol=1e-5)
    y.square().mean().backward()
    assert all(p.grad is not None for p in tuning.parameters())


def perturb(tuning: mmpeft.Tuning, seed: int = 1, by: float = 0.05) -> None:
    """Move every trainable tensor by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(dense(a), dense(b))


def _grad(loss: Tensor, tuning: mmpeft.Tuning) -> tuple[Tensor, ...]:
    """Zeros for what the answer of a family leaves out, such as the temperature of a pair of towers."""
    return torch.autograd.grad(loss, list(tuning.parameters()), allow_unused=True, materialize_grads=True)


def _grads(tuning: mmpeft.Tuning, example: Example) -> dict[str, Tensor]:
    torch.manual_seed(0)
    parameters = dict(tuning.named_parameters())
    y = example()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return dict(zip(parameters, _grad((y * weights).sum(), tuning)))
