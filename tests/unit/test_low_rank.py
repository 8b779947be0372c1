"""The low-rank formulas against dense ones, and the fused function against PyTorch's own autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmpeft.functional.fused import Update, effective_weight, low_rank_composed, low_rank_linear
from mmpeft.functional.low_rank import low_rank_apply, low_rank_delta, low_rank_row_norms, squared_row_norms

sizes = st.integers(1, 9)


@given(rows=sizes, columns=sizes, rank=sizes, scale=st.floats(-3, 3), batch=sizes)
def test_apply_equals_the_materialised_delta(rows: int, columns: int, rank: int, scale: float, batch: int) -> None:
    x, down, up = (
        torch.randn(batch, columns).double(),
        torch.randn(rank, columns).double(),
        torch.randn(rows, rank).double(),
    )
    dense = x @ low_rank_delta(down, up, scale).T
    torch.testing.assert_close(low_rank_apply(x, down, up, scale), dense)


@given(rows=sizes, columns=sizes, rank=sizes, scale=st.floats(-3, 3))
def test_row_norms_without_the_product(rows: int, columns: int, rank: int, scale: float) -> None:
    weight, down, up = torch.randn(rows, columns), torch.randn(rank, columns), torch.randn(rows, rank)
    dense = (weight.double() + scale * up.double() @ down.double()).norm(dim=1)
    norms = low_rank_row_norms(weight, squared_row_norms(weight), down, up, scale)
    torch.testing.assert_close(norms.double(), dense, atol=2e-3, rtol=2e-4)


def test_row_norms_at_init_are_the_weights_own() -> None:
    weight = torch.randn(5, 7)
    square = squared_row_norms(weight)
    norms = low_rank_row_norms(weight, square, torch.randn(2, 7), torch.zeros(5, 2), 1.0)
    assert torch.equal(norms, square.sqrt())


def _problem(batch: int, gained: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Update]]:
    weight, bias = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype, requires_grad=True)
    x = torch.randn(2, batch, 16, dtype=dtype, requires_grad=True)
    updates = []
    for start, stop in ((0, 8), (16, 24)):
        tensors = [torch.randn(4, 16, dtype=dtype), torch.randn(stop - start, 4, dtype=dtype)]
        gain = torch.randn(stop - start, dtype=dtype).requires_grad_() if gained else None
        updates.append(Update(start, stop, 0.7, *[t.requires_grad_() for t in tensors], gain))
    return x, weight, bias, updates


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("batch", [3, 300], ids=["apply", "effective"])
def test_fused_equals_composed(batch: int, gained: bool) -> None:
    """Both evaluations of the fused function, on row slices, with and without gains: values and all gradients."""
    x, weight, bias, updates = _problem(batch, gained, torch.float64)
    inputs = [x, bias, *[t for u in updates for t in u[3:] if t is not None]]
    upstream = torch.randn(2, batch, 24, dtype=torch.float64)
    expected = low_rank_composed(x, weight, bias, updates)
    actual = low_rank_linear(x, weight, bias, updates)
    torch.testing.assert_close(actual, expected)
    for name, a, b in zip(
        ("x", "bias", *"ABgABg"),
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
    ):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("batch", [1, 40], ids=["apply", "effective"])
def test_gradcheck(batch: int) -> None:
    x, weight, bias, updates = _problem(batch, True, torch.float64)
    tensors = [x[:, :batch].detach().requires_grad_(), bias, *[t for u in updates for t in u[3:]]]

    def function(x: Tensor, bias: Tensor, *flat: Tensor) -> Tensor:
        again = [Update(u.start, u.stop, u.scale, *flat[3 * i : 3 * i + 3]) for i, u in enumerate(updates)]
        return low_rank_linear(x, weight, bias, again)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("batch", [3, 300], ids=["apply", "effective"])
def test_autocast_keeps_no_copy_of_the_weight(batch: int) -> None:
    x, weight, bias, updates = _problem(batch, False, torch.float32)
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = low_rank_linear(x, weight, bias, updates)
    assert y.dtype == torch.bfloat16
    assert not any(t.dtype == torch.bfloat16 and t.shape == weight.shape for t in kept)
    assert any(t is weight or t.data_ptr() == weight.data_ptr() for t in kept)
    assert [t.dtype for t in kept if t.shape[-1] == 16 and len(t) == 2 * batch] == [torch.bfloat16], "the input, once"
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert updates[0].down.grad is not None
    assert updates[0].down.grad.dtype == torch.float32


def test_effective_weight_at_init_is_the_weight_bit_for_bit() -> None:
    weight = torch.randn(6, 4)
    update = Update(0, 6, 2.0, torch.randn(2, 4), torch.zeros(6, 2))
    assert torch.equal(effective_weight(weight, [update]), weight)


def test_an_input_without_gradient_costs_no_input_gradient() -> None:
    _, weight, bias, updates = _problem(3, False, torch.float32)
    y = low_rank_linear(torch.randn(5, 16), weight, bias, updates)
    y.sum().backward()
    assert updates[1].up.grad is not None
