"""Diff pruning: the gates' formula, the noise of a step, the choice, what is saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.functional.hard_concrete import hard_concrete, logistic_noise, open_probability
from mmpeft.sites import sites
from tests.matrix.families import FAMILIES
from tests.unit.toy import Toy

METHOD = mmpeft.DiffPruning(density=0.05, penalty=1e-4, until=0.5)


@given(st.floats(-4, 4))
def test_how_often_a_gate_is_open_is_what_the_penalty_counts(alpha: float) -> None:
    noise = logistic_noise(torch.empty(20_000), torch.Generator().manual_seed(0))
    drawn = hard_concrete(torch.tensor(alpha), noise)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert abs((drawn > 0).float().mean() - open_probability(torch.tensor(alpha))) < 0.02


def run(model: Toy, method: mmpeft.DiffPruning, steps: int = 8, micro: int = 1, recompute: bool = False):
    tuning = mmpeft.attach(model, method)
    tuning.recompute = "block" if recompute else None
    model.train()
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2, weight_decay=0.1)
    control = tuning.controllers
    control.fit_start(steps)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for _ in range(micro):
            control.before_forward()
            x = torch.randn(4, 5, 8, generator=generator)
            (model(x).square().mean() + control.penalty()).backward()
        control.before_step()
        optimizer.step()
        control.after_step()
        optimizer.zero_grad()
    control.fit_end()
    model.eval()
    return tuning


@pytest.mark.parametrize(
    "method",
    [METHOD, mmpeft.DiffPruning(density=0.02, structured=True), mmpeft.DiffPruning(density=0.05, at="path=blocks.1.*")],
)
def test_a_run_ends_at_its_density_and_saves_a_plan(method, tmp_path) -> None:
    model, x = Toy(), torch.randn(2, 5, 8)
    tuning = run(model, method)
    entries = sum(p.part.w.numel() for p in tuning.placements)
    kept = sum(int(p.part.mask.sum()) for p in tuning.placements)
    assert kept == round(method.density * entries)
    assert not any(p.part.w[~p.part.mask].any() for p in tuning.placements)
    tuned = model(x)
    tuning.save(tmp_path, inference=True)
    other = Toy()
    loaded = mmpeft.load(other, tmp_path)
    assert type(loaded.method).__name__ == "Plan"
    assert sum(p.numel() for p in loaded.parameters()) == kept == loaded.method.count(other, sites(other))
    torch.testing.assert_close(other(x), tuned)
    tuning.save(tmp_path / "whole")  # values and gates: the gates alone tell what the mask was
    again = Toy()
    mmpeft.load(again, tmp_path / "whole")
    again.eval()
    assert torch.equal(again(x), tuned)
    tuning.merge()
    torch.testing.assert_close(model(x), tuned)
    tuning.unmerge()
    tuning.for_inference()
    torch.testing.assert_close(model(x), tuned)


def test_before_the_choice_the_adapter_is_what_trains() -> None:
    model = Toy()
    tuning = mmpeft.attach(model, METHOD)
    method, tensors, placements = tuning.inference_form()
    assert method is tuning.method
    assert placements is tuning.placements
    assert {name.rpartition(".")[2] for name in tensors} == {"w", "a"}


def test_a_block_computed_again_sees_the_same_gates() -> None:
    first, second = (run(Toy(), METHOD, micro=2, recompute=flag) for flag in (False, True))
    for one, other in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(one, other)


def test_noise_is_new_for_every_micro_batch_and_gone_between_steps() -> None:
    model = Toy().train()
    tuning = mmpeft.attach(model, mmpeft.DiffPruning(density=0.05, start=0.0))
    part, control = tuning.placements[0].part, tuning.controllers
    torch.nn.init.ones_(part.w)
    control.fit_start(10)
    control.before_forward()
    first = part.delta()
    assert torch.equal(part.delta(), first)
    control.before_forward()
    assert not torch.equal(part.delta(), first)
    control.after_step()
    at_rest = part.delta()
    model.eval()
    assert torch.equal(part.delta(), at_rest)
    with pytest.raises(ConfigError, match="less than one"):
        mmpeft.attach(Toy(), mmpeft.DiffPruning(density=1e-9))


def test_a_slice_of_a_fused_projection_goes_into_the_plan_of_its_tensor() -> None:
    example = FAMILIES["vit"]()
    tuning = mmpeft.attach(example.model, mmpeft.DiffPruning(density=0.1, at="attn.{q,v}"))
    with torch.no_grad():
        for p in tuning.placements:
            p.part.w.normal_()
    tuning.controllers.fit_start(1)
    tuning.controllers.fit_end()
    before = example.answer()
    tuning.for_inference()
    torch.testing.assert_close(example.answer(), before, atol=1e-5, rtol=1e-5)
