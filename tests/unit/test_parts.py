"""Pointwise maths and parts in small."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmpeft.functional.pointwise import along, bottleneck, insert_tokens, stochastic_depth, strip_tokens
from mmpeft.parts import Branch, Delta, LowRank, Mask, Rescale


@given(batch=st.integers(1, 3), count=st.integers(1, 6), tokens=st.integers(1, 4), prefix=st.integers(0, 3))
def test_strip_undoes_insert(batch: int, count: int, tokens: int, prefix: int) -> None:
    x, prompt = torch.randn(batch, prefix + count, 5), torch.randn(tokens, 5)
    longer = insert_tokens(x, prompt, prefix)
    assert torch.equal(longer[:, prefix : prefix + tokens], prompt.expand(batch, -1, -1))
    assert torch.equal(strip_tokens(longer, tokens, prefix), x)


def test_bottleneck_formula() -> None:
    x, d, bd, u, bu = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2), torch.randn(4, 2), torch.randn(4)
    expected = torch.relu(x @ d.T + bd) @ u.T + bu
    torch.testing.assert_close(bottleneck(x, d, bd, u, bu, torch.relu), expected)


def test_stochastic_depth_keeps_the_mean() -> None:
    y = stochastic_depth(torch.ones(20_000, 1), 0.3)
    assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(1.0).div(0.7))}
    assert abs(y.mean() - 1) < 0.02


def test_along_broadcasts_over_the_channel_dimension() -> None:
    vector = torch.arange(3.0)
    assert along(vector, 4, 1).shape == (1, 3, 1, 1)
    assert along(vector, 3, -1) is vector


def test_delta_on_a_grouped_and_a_strided_convolution_equals_the_effective_weight() -> None:
    for groups, kind in ((1, "exit"), (4, "read")):
        conv = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=groups, padding_mode="circular")
        part = Delta(
            conv.weight, LowRank(len(conv.weight), conv.weight[0].numel(), 2, conv.weight), scale=1.5, magnitude=True
        )
        nn.init.normal_(part.factor.B, std=0.3)
        x = torch.randn(2, 8, 9, 9)
        dense = conv._conv_forward(x, part.read(conv, "weight", conv.weight), conv.bias)
        if kind == "exit":
            torch.testing.assert_close(part.exit(conv, x, conv(x)), dense, atol=1e-5, rtol=1e-5)


def test_trainables_are_fp32_on_a_low_precision_base_and_identity_is_exact() -> None:
    linear = nn.Linear(6, 5).bfloat16()
    delta = Delta(linear.weight, LowRank(*linear.weight.shape, 2, linear.weight), scale=1.0)
    mask, rescale = Mask(linear.weight, rows=(1, 3)), Rescale(5, linear.weight, shift=True)
    branch = Branch(5, 2, linear.weight, source="output")
    for part in (delta, mask, rescale, branch):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    x = torch.randn(3, 6).bfloat16()
    y = linear(x)
    for tuned in (delta.exit(linear, x, y), rescale.exit(linear, x, y), branch.exit(linear, x, y)):
        assert tuned.dtype == torch.bfloat16
        assert torch.equal(tuned, y)
    assert torch.equal(mask.read(linear, "weight", linear.weight), linear.weight)
    assert mask.value.shape == (2, 6)
