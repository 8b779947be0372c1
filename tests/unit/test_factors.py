"""Kronecker and Hadamard factors and hypercomplex linears against products that are formed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmpeft
from mmpeft.errors import ConfigError, Refused
from mmpeft.functional.hadamard import hadamard_product, khatri_rao
from mmpeft.functional.kron import balanced_factor, kron_apply, kron_sum
from mmpeft.parts.factors import Hadamard, KhatriRao, Kron, LowRankKron, PHMBank, PHMLinear
from mmpeft.parts.shared import Shared
from tests.matrix.families import FAMILIES
from tests.unit.toy import Toy

sizes = st.integers(1, 6)


@given(a=sizes, b=sizes, c=sizes, d=sizes, batch=sizes)
def test_kron_applies_without_being_formed(a: int, b: int, c: int, d: int, batch: int) -> None:
    left, right = torch.randn(a, c).double(), torch.randn(b, d).double()
    x = torch.randn(2, batch, c * d).double()
    torch.testing.assert_close(kron_apply(x, left, right), x @ torch.kron(left, right).T)


@given(n=sizes, a=sizes, b=sizes, c=sizes, d=sizes)
def test_a_hypercomplex_matrix_is_a_sum_of_kronecker_products(n: int, a: int, b: int, c: int, d: int) -> None:
    left, rows, columns = torch.randn(n, a, c).double(), torch.randn(n, b).double(), torch.randn(n, d).double()
    dense = sum(torch.kron(left[k], torch.outer(rows[k], columns[k])) for k in range(n))
    torch.testing.assert_close(kron_sum(left, rows, columns), dense)


@given(st.integers(1, 5000))
def test_the_balanced_factor_divides_and_is_nearest(size: int) -> None:
    found = balanced_factor(size)
    assert size % found == 0
    assert found**2 <= size
    assert not any(size % d == 0 for d in range(found + 1, int(size**0.5) + 1))


@given(rows=sizes, columns=sizes, rank=sizes, other=sizes)
def test_a_hadamard_product_and_its_low_rank_form(rows: int, columns: int, rank: int, other: int) -> None:
    shapes = ((rows, rank), (rank, columns), (rows, other), (other, columns))
    factors = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    dense = (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    formed = hadamard_product(*factors)
    up, down = khatri_rao(*factors)
    torch.testing.assert_close(formed, dense)
    torch.testing.assert_close(up @ down, dense)
    grad = torch.randn(rows, columns).double()
    wanted = torch.autograd.grad(dense, factors, grad)
    for ours in (torch.autograd.grad(formed, factors, grad), torch.autograd.grad(up @ down, factors, grad)):
        for one, other_one in zip(ours, wanted):
            torch.testing.assert_close(one, other_one)


def test_a_hadamard_product_keeps_its_factors_alone_for_backward() -> None:
    factor, kept = Hadamard(64, 64, 2, torch.zeros(1)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda x: x):
        factor.materialise()
    assert sorted(kept) == [128] * 4


def test_loha_runs_as_the_low_rank_product_while_that_is_less_work() -> None:
    (small,) = mmpeft.attach(Toy(), mmpeft.LoHa(at="mlp.up & depth=0", rank=1)).placements
    (large,) = mmpeft.attach(Toy(), mmpeft.LoHa(at="mlp.up & depth=0", rank=4)).placements
    assert (type(small.part.factor), type(large.part.factor)) == (KhatriRao, Hadamard)
    assert (small.hooks[0].kind, large.hooks[0].kind) == ("call", "call")


def test_lokr_is_low_rank_or_whole_as_in_lycoris() -> None:
    """16 = 4·4 outputs and 8 = 2·4 inputs: from rank 2 on the second factor is whole, and its scale 1."""
    (low,) = mmpeft.attach(Toy(), mmpeft.LoKr(at="mlp.up & depth=0", rank=1, alpha=3)).placements
    (whole,) = mmpeft.attach(Toy(), mmpeft.LoKr(at="mlp.up & depth=0", rank=2, alpha=3)).placements
    assert (type(low.part.factor), low.part.scale) == (LowRankKron, 3.0)
    assert (type(whole.part.factor), whole.part.scale) == (Kron, 1.0)
    factor = low.part.factor
    torch.nn.init.normal_(factor.B)
    x = torch.randn(2, 5, 8)
    dense = torch.kron(factor.left, factor.B @ factor.A)
    torch.testing.assert_close(factor(x), x @ dense.T)
    torch.testing.assert_close(factor.materialise(), dense)


def test_kron_starts_at_zero_with_one_factor_alive() -> None:
    factor = Kron((2, 3), (4, 5), torch.zeros(1))
    assert factor.materialise().abs().max() == 0
    x = torch.randn(7, 15)
    factor(x).sum().backward()
    assert factor.right.grad.abs().max() > 0


def test_krona_on_a_fused_projection_changes_its_own_rows_alone() -> None:
    example = FAMILIES["vit"]()
    tuning = mmpeft.attach(example.model, mmpeft.KronA(at="attn.v", scale=2.0))
    for p in tuning.parameters():
        torch.nn.init.normal_(p)
    host, part = example.model.blocks[0].attn.qkv, tuning.placements[0].part
    width = host.in_features
    x = torch.randn(2, 5, width)
    change = host(x) - torch.nn.functional.linear(x, host.weight, host.bias)
    assert torch.equal(change[..., : 2 * width], torch.zeros(2, 5, 2 * width))
    expected = 2.0 * x @ torch.kron(part.factor.left, part.factor.right).T
    torch.testing.assert_close(change[..., 2 * width :], expected, atol=1e-4, rtol=1e-4)


def test_shapes_by_choice_and_by_default() -> None:
    (first, *_) = mmpeft.attach(Toy(), mmpeft.KronA(at="mlp.up")).placements
    assert [tuple(p.shape) for p in first.part.parameters()] == [(4, 2), (4, 4)]  # 16 = 4·4 and 8 = 2·4
    (first, *_) = mmpeft.attach(Toy(), mmpeft.KronA(at="mlp.up", left=(8, 1))).placements
    assert [tuple(p.shape) for p in first.part.parameters()] == [(8, 1), (2, 8)]
    with pytest.raises(Refused, match="choose divisors"):
        mmpeft.attach(Toy(), mmpeft.KronA(at="mlp.up", left=(3, 1)))
    with pytest.raises(ConfigError, match="rows, columns"):
        mmpeft.KronA(left=(3,))


def test_kronab_with_a_learned_residual() -> None:
    example = FAMILIES["vit"]()
    plain = example.answer()
    method = mmpeft.KronAB(residual="learned", scale=0.5)
    tuning = mmpeft.attach(example.model, method)
    assert torch.equal(example.answer(), plain)
    part, host = tuning.placements[0].part, example.model.blocks[0].mlp
    for p in tuning.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 5, host.fc1.in_features)
    with mmpeft.use(example.model, None):
        base = host(x)
    expected = base + 0.5 * x @ part.factor.materialise().T + part.residual * x
    torch.testing.assert_close(host(x), expected, atol=1e-4, rtol=1e-4)


def test_a_bank_is_owned_once_and_learns_from_every_linear() -> None:
    bank = Shared(PHMBank(2, torch.zeros(1)))
    first, second = (PHMLinear(4, 6, 2, bank.view(), torch.zeros(1)) for _ in range(2))
    assert [name for name, _ in first.named_parameters()] == ["s", "t", "bias"]
    first.weight.sum().backward()
    once = bank.owned.A.grad.clone()
    second.weight.sum().backward()
    assert not torch.equal(bank.owned.A.grad, once)
    assert first.weight.shape == (6, 4)


def test_compacter_counts_its_bank_once_and_refuses_what_n_does_not_divide() -> None:
    example = FAMILIES["vit"]()
    tuning = mmpeft.attach(example.model, mmpeft.Compacter(n=4, bottleneck=8))
    names = [name for name, _ in tuning.named_parameters()]
    assert sum(name.endswith("owned.A") for name in names) == 1
    parts = [p for p in tuning.placements if p.hooks]
    width = example.model.num_features
    assert sum(p.numel() for p in tuning.parameters()) == 4**3 + len(parts) * 3 * (width + 8)
    with pytest.raises(ConfigError, match="does not divide bottleneck=6"):
        mmpeft.Compacter(n=4, bottleneck=6)
    with pytest.raises(Refused, match="does not divide its width"):
        mmpeft.attach(FAMILIES["vit"]().model, mmpeft.Compacter(n=7))
