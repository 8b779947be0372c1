"""What modules of other people do, that a tuning must neither notice nor disturb; references are untouched copies."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import mmpeft
from mmpeft.errors import Refused
from mmpeft.hosting.output import first_of, with_first
from mmpeft.parts.prefix import Prefix
from mmpeft.parts.product import FUSED_FROM
from mmpeft.sites import structure
from tests.support.moved import perturb
from tests.support.small import small

X = torch.rand(2, 4, 8, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "value rest")


class Holding(nn.Module):
    """Parameters by names that a host could have taken for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.reads, self.packed = (nn.Parameter(torch.rand(8)) for _ in range(3))
        self.weight = nn.Parameter(torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.base + self.reads, self.weight) * self.packed


class InPlace(nn.Module):
    """Scales what its product gave in place, as Longformer does its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.query(x)
        y /= 2.0
        return y


class Several(nn.Module):
    """A residual block whose sub-layer answers with more than a tensor."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind, self.own = kind, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.own(x), "beside")


def test_names_of_parameters_are_the_modules_own() -> None:
    model = Holding()
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="kind=linear"), example=X)
    torch.testing.assert_close(model(X), plain(X))
    perturb(tuning)
    tuned = model(X)
    assert not torch.allclose(tuned, plain(X))
    tuning.merge()
    torch.testing.assert_close(model(X), tuned)


@pytest.mark.parametrize("rows", [4, FUSED_FROM // 8])
def test_a_result_may_be_changed_in_place(rows: int) -> None:
    """As one call that composes what comes out, and as one function that is fused."""
    model, x = InPlace().double(), torch.rand(rows, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="kind=linear"), example=x)
    perturb(tuning)
    model(x).square().sum().backward()
    (part,) = (placement.part for placement in tuning.placements)
    down, up = part.factor.pair()
    plain.query.weight.data += part.scale * (up @ down).detach()
    torch.testing.assert_close(model(x), plain(x))
    slope = torch.autograd.grad(plain(x).square().sum(), plain.query.weight)[0]
    torch.testing.assert_close(part.factor.B.grad, part.scale * slope @ down.detach().t())


def test_a_gain_says_that_it_needs_the_result() -> None:
    model = InPlace()
    perturb(mmpeft.attach(model, mmpeft.DoRA(rank=2, at="kind=linear"), example=X))
    y = model(torch.rand(FUSED_FROM // 8, 8))
    with pytest.raises(Refused, match="changes the result of a product in place"):
        y.square().sum().backward()


@pytest.mark.parametrize(
    "kind", [lambda *values: list(values), lambda *values: values, Pair], ids=["list", "tuple", "named"]
)
def test_outputs_keep_their_kind(kind: Callable[..., Any]) -> None:
    output = Several(kind)(X)
    changed = with_first(output, first_of(output) + 1)
    assert type(changed) is type(output)
    assert torch.equal(changed[0], output[0] + 1)
    assert changed[1] == "beside"
    assert with_first(X, X + 1).equal(X + 1)


def test_a_parametrised_weight_is_tuned_and_its_merge_refused() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="kind=linear"), example=X)
    perturb(tuning)
    tuned = model(X)
    assert not torch.allclose(tuned, plain(X))
    with pytest.raises(Refused, match=r"0\.weight is computed by a parametrization"):
        tuning.merge()
    assert torch.equal(model(X), tuned)


def test_the_bias_of_a_parametrised_layer_is_merged() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    tuning = mmpeft.attach(model, mmpeft.BitFit(at="path=0.bias"), example=X)
    perturb(tuning)
    tuned = model(X)
    tuning.merge()
    torch.testing.assert_close(model(X), tuned)


def test_a_block_that_runs_four_times_is_saved_whole(tmp_path: Path) -> None:
    """ALBERT's only block: one attention and one network, however often they run."""
    model = small("albert")
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.Houlsby(bottleneck=4))
    assert sorted(site.role for site in structure(plain) if site.role in ("attn", "mlp")) == ["attn", "mlp"]
    perturb(tuning)
    tuning.save(tmp_path)
    mmpeft.load(twin, tmp_path)
    words = torch.arange(3, 9)[None]
    assert torch.equal(twin(input_ids=words).logits, model(input_ids=words).logits)
    assert not torch.allclose(plain(input_ids=words).logits, model(input_ids=words).logits)


def test_the_second_name_of_a_head_s_bias_is_left_to_the_head() -> None:
    model = small("bert")
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    tuning = mmpeft.attach(model, mmpeft.BitFit())
    assert not any(placement.home == "cls.predictions" for placement in tuning.placements)


def test_learned_keys_are_repeated_as_their_model_repeats_heads() -> None:
    part = Prefix(3, 2, 4, X, None)  # type: ignore[arg-type]
    keys, values = torch.rand(5, 2, 6, 4), torch.rand(5, 4, 6, 4)
    longer, mixed = part.extend(keys, values)
    assert part.tokens is not None
    own = part.tokens.transpose(1, 2)
    assert longer.shape == (5, 2, 9, 4)
    assert torch.equal(longer[1, :, :3], own[0])
    for head in range(4):
        assert torch.equal(mixed[2, head, :3], own[1, head // 2])
    assert torch.equal(mixed[:, :, 3:], values)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("deepseek_v32", "an indexer chooses its keys"),
        ("mimo_v2_flash", "keys and values are of different widths"),
        ("fastspeech2_conformer", "scores are a sum of several products"),
        ("mask2former", "asked for its weights"),
    ],
)
def test_attentions_without_a_way_in_for_learned_keys_say_why(kind: str, reason: str) -> None:
    assert any(reason in site.refuse for site in structure(small(kind)) if site.role == "kv")
