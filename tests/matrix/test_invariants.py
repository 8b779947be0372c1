"""Every method × every backbone family × the invariants that any tuning must keep."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch

import mmpeft
from mmpeft.errors import MMPEFTError, Refused
from mmpeft.few_bits import dense
from mmpeft.parts import Rescale
from mmpeft.sites import sites
from mmpeft.state import state_of
from mmpeft.surgery import base_parameters
from tests.matrix.cells import ALIKE, CELLS, Cell, decided
from tests.matrix.example import BATCH, Example
from tests.matrix.expected import REFUSED, UNMERGEABLE, reason
from tests.matrix.families import FAMILIES
from tests.matrix.families.few_bits import FAMILIES as FEW_BITS


@cache
def _pickled(family: str) -> bytes:
    return pickle.dumps(FAMILIES[family]())


def _fresh(family: str) -> Example:
    if family in FEW_BITS:  # neither library's weights survive a pickle
        return FEW_BITS[family]()
    return pickle.loads(_pickled(family))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(dense(a), dense(b))


def _perturb(tuning: mmpeft.Tuning, seed: int = 1, by: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


def _grad(loss: torch.Tensor, tuning: mmpeft.Tuning) -> tuple[torch.Tensor, ...]:
    """Zeros for what the answer of a family leaves out, such as the temperature of a pair of towers."""
    return torch.autograd.grad(loss, list(tuning.parameters()), allow_unused=True, materialize_grads=True)


def _grads(tuning: mmpeft.Tuning, example: Example) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parameters = dict(tuning.named_parameters())
    y = example()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return dict(zip(parameters, _grad((y * weights).sum(), tuning)))


refused = [cell for cell in CELLS if reason(REFUSED, cell.label, cell.family)]
working = [cell for cell in CELLS if not reason(REFUSED, cell.label, cell.family)]
families = pytest.mark.parametrize("cell", working, ids=str)
TURNS = ("merge", "recomputation", "copies")


def share(invariant: str) -> pytest.MarkDecorator:
    """Every cell, those marked slow that have another of the `TURNS` for their turn in the ordinary suite.

    The turns go round along methods and along families, so that each method and each family meets each invariant.
    Methods that differ from another one only in which entries they choose (`ALIKE`) are left out.
    """
    labels, names = list(dict.fromkeys(c.label for c in CELLS)), list(FAMILIES)
    cells = []
    for cell in working:
        if cell.label not in ALIKE:
            turn = TURNS[(labels.index(cell.label) + names.index(cell.family)) % len(TURNS)]
            marks = () if turn == invariant else pytest.mark.slow
            cells.append(pytest.param(cell, id=str(cell), marks=marks))
    return pytest.mark.parametrize("cell", cells)


@pytest.mark.parametrize("cell", refused, ids=str)
def test_refusal_names_the_reason_and_changes_nothing(cell: Cell) -> None:
    example = _fresh(cell.family)
    model = example.model
    before, keys = example.answer(), list(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(MMPEFTError, match=reason(REFUSED, cell.label, cell.family)):
        mmpeft.attach(model, decided(example, cell.method))
    assert list(model.state_dict()) == keys
    assert torch.equal(example.answer(), before)
    assert [p.requires_grad for p in model.parameters()] == flags


@families
def test_one_cell(cell: Cell, tmp_path) -> None:
    """Invariants 1, 2, 3, 4, 6, 7, 9 on one model, in the order of a user's session."""
    example = _fresh(cell.family)
    model = example.model
    plain = example.answer()
    kind, original = type(model), {k: v.clone() for k, v in model.state_dict().items()}
    available = sites(model)
    method = decided(example, cell.method)
    assert torch.equal(example.answer(), plain), "deciding has changed the model"
    expected = method.count(model, available)
    tuning = mmpeft.attach(model, method)

    # 1 identity at init, or declared; the same object, keys kept
    assert isinstance(model, kind)
    assert set(original) <= set(model.state_dict())
    difference = (example.answer() - plain).abs().max()
    assert (difference == 0) == cell.method.identity, f"max difference {difference}"

    # 3 exact trainable set and closed-form count
    own = {id(p) for p in tuning.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert sum(p.numel() for p in tuning.parameters()) == expected == tuning.report().trainable

    # 2 alive on every site, 4 no drift under AdamW with weight decay; and the check leaves no trace
    before = example.answer()
    alive = tuning.liveness(example.batch)
    blind = not (cell.method.decided or cell.method.needs_data)  # a mask drawn without data may hit unused entries
    assert not alive.moved
    assert len(alive.dead) <= (0.1 * len(alive.pulses) if blind else 0), alive.dead
    assert torch.equal(example.answer(), before)

    # 7 a mixed batch equals separate runs
    _perturb(tuning)
    tuned = example.answer()
    rows = ["default" if i % 2 == 0 else None for i in range(BATCH)]
    with mmpeft.use(model, rows):
        mixed = example.answer()
    assert not torch.allclose(tuned, plain, atol=1e-4), "the perturbed tuning has no effect"
    torch.testing.assert_close(mixed[0::2], tuned[0::2], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1::2], plain[1::2], atol=2e-6, rtol=1e-5)
    with mmpeft.use(model, None):
        assert torch.equal(example.answer(), plain)

    # 9 save and load; the file holds the trainable bytes (adapters that a fusion froze too) and a header
    tuning.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    kept = tuning.state_dict().values()
    assert file.stat().st_size <= sum(t.numel() * t.element_size() for t in kept) + 200 * len(kept) + 512
    other = _fresh(cell.family)
    mmpeft.load(other.model, tmp_path)
    assert torch.equal(other.answer(), tuned)

    # 6 detach leaves the original state dict and class
    tuning.detach()
    assert type(model) is kind
    assert list(model.state_dict()) == list(original)
    assert all(_same(v, original[k]) for k, v in model.state_dict().items())
    assert torch.equal(example.answer(), plain)


@share("merge")
def test_merge(cell: Cell) -> None:
    """5: merge equals the tuned forward, un-merge restores the bits; what cannot merge says why.

    Half the strength is half-way to the merged weights, to first order where a gain and a bias meet in one layer, and
    for other methods something between off and on; what has no strength says so.
    """
    example = _fresh(cell.family)
    model, base = example.model, example.answer()
    tuning = mmpeft.attach(model, decided(example, cell.method))
    _perturb(tuning, by=0.02)
    tuned, bits = example.answer(), {n: p.clone() for n, p in base_parameters(model)}
    if not cell.method.mergeable or reason(UNMERGEABLE, cell.label, cell.family):
        with pytest.raises(Refused, match=reason(UNMERGEABLE, cell.label, cell.family) or "cannot be merged"):
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
    assert all(_same(p, bits[n]) for n, p in base_parameters(model))


@share("recomputation")
def test_recomputation(cell: Cell) -> None:
    """8: the same gradients with activation recomputation, with another route set between forward and backward."""
    example = _fresh(cell.family)
    model = example.model
    tuning = mmpeft.attach(model, decided(example, cell.method))
    _perturb(tuning)
    plain = _grads(tuning, example)
    for mode in ("block", "pointwise"):
        tuning.recompute = mode
        for name, gradient in _grads(tuning, example).items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4, msg=f"{mode}: {name}")
    tuning.recompute = "block"
    y = example()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    with mmpeft.use(model, None):
        late = _grad((y * weights).sum(), tuning)
        assert state_of(model).route is None
    for name, gradient in zip(plain, late):
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4, msg=f"switched: {name}")


@share("copies")
def test_copies_precision_and_accumulation(cell: Cell) -> None:
    """10: deepcopy, pickle, bf16 autocast; 11: gradients of a batch equal the sum over its halves."""
    example = _fresh(cell.family)
    model = example.model
    tuning = mmpeft.attach(model, decided(example, cell.method))
    _perturb(tuning)
    y = example.answer()
    pickled = () if cell.family in FEW_BITS else (pickle.loads(pickle.dumps(model)),)
    for twin in (copy.deepcopy(model), *pickled):
        assert torch.equal(example.answer(twin), y)
        (handle,) = mmpeft.tunings(twin).values()
        with torch.no_grad():
            next(handle.parameters()).add_(1.0)
        assert torch.equal(example.answer(), y), "the copy shares tensors with the original"
    with torch.autocast("cpu", torch.bfloat16):
        low = example()
        grads = _grad(low.float().square().sum(), tuning)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (low.float() - y).norm() < 0.3 * y.norm()
    whole = _grad(example().square().sum(), tuning)
    halves = [_grad(example(batch=half).square().sum(), tuning) for half in example.halves()]
    for full, *parts in zip(whole, *halves):
        torch.testing.assert_close(sum(parts), full, atol=1e-4, rtol=1e-3)


COMPILED = [c for c in working if c.family in ("vit", "beit", "eva02") and "[" not in c.label and c.label not in ALIKE]


@pytest.mark.parametrize("cell", COMPILED, ids=str)
def test_compile_without_graph_breaks(cell: Cell) -> None:
    """10: dynamo traces the tuned model as one graph and computes the same."""
    example = _fresh(cell.family)
    model = example.model
    tuning = mmpeft.attach(model, decided(example, cell.method))
    _perturb(tuning)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = example(compiled)
    torch.testing.assert_close(y, example(), atol=1e-5, rtol=1e-5)
    y.square().mean().backward()
    assert all(p.grad is not None for p in tuning.parameters())
