"""Soft top-k against its definition, finite differences and the iteration of the paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.functional.soft_top_k import soft_top_k


@given(
    n=st.integers(2, 40), part=st.floats(0.01, 1.0), epsilon=st.sampled_from([0.03, 0.3, 1.0]), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_budget_is_filled_exactly_and_order_is_kept(n: int, part: float, epsilon: float, seed: int) -> None:
    k = max(1, round(part * n))
    scores = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    weights = soft_top_k(scores, k, epsilon)
    torch.testing.assert_close(weights.sum(-1), torch.full((3,), float(k)), atol=1e-4, rtol=1e-5)
    assert weights.min() >= 0
    assert weights.max() <= 1
    ordered = weights.gather(-1, scores.argsort(-1, descending=True))
    assert (ordered.diff(dim=-1) <= 1e-6).all()


def test_weights_have_the_form_of_the_optimum() -> None:
    scores = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = soft_top_k(scores, 5, 0.5)
    below = weights < 1
    shift = 0.5 * weights.log() - scores  # the same `a` for every weight below 1
    for row, own in zip(shift, below):
        torch.testing.assert_close(row[own], row[own][:1].expand(int(own.sum())))
    for row, own, s in zip(shift, below, scores):
        assert (s[~own] + row[own][0] >= -1e-9).all()


def test_gradients_match_finite_differences() -> None:
    scores = torch.randn(3, 9, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    for k, epsilon in ((1, 0.5), (3, 0.3), (8, 1.0)):
        assert torch.autograd.gradcheck(lambda s, k=k, e=epsilon: soft_top_k(s, k, e), (scores,))


def test_padding_weighs_nothing_and_few_scores_weigh_one() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -torch.inf], [0.3, -torch.inf, -torch.inf, -torch.inf]], requires_grad=True)
    weights = soft_top_k(scores, 2, 0.3)
    assert weights[0, 3] == 0
    torch.testing.assert_close(weights.sum(-1), torch.tensor([2.0, 1.0]))
    assert torch.equal(weights[1], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad((weights * torch.arange(4.0)).sum(), scores)
    assert torch.isfinite(gradient).all()
    assert torch.equal(soft_top_k(torch.randn(2, 4), 4, 0.03), torch.ones(2, 4))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_half_precision_and_extreme_scores(scale: float) -> None:
    scores = (scale * torch.randn(2, 64)).bfloat16()
    weights = soft_top_k(scores, 16, 0.03)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.full((2,), 16.0), atol=1e-3, rtol=1e-4)


def test_the_usual_iteration_converges_to_it_slowly() -> None:
    """Coordinate descent, as published code has it: twenty rounds miss the budget, thousands find the same weights."""
    s, k, epsilon = torch.randn(64, generator=torch.Generator().manual_seed(0)), 16, 0.03
    b, found = -s, {}
    for rounds in range(1, 3001):
        a = epsilon * (torch.tensor(float(k)).log() - ((s + b) / epsilon).logsumexp(-1))
        b = -(s + a).clamp(min=0)
        found[rounds] = ((s + a + b) / epsilon).exp()
    assert (found[20].sum() - k).abs() > 0.05 * k
    torch.testing.assert_close(found[3000], soft_top_k(s, k, epsilon), atol=1e-3, rtol=0)
