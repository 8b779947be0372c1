"""Choosing entries: thresholds without sorting, sparse products, plans, budgets."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mmpeft
from mmpeft.controllers.scores import score
from mmpeft.errors import AdapterFileError, ConfigError, DataError
from mmpeft.functional.sparse import compressed, sparse_apply
from mmpeft.functional.top_k import kth_largest, top_k_masks
from mmpeft.methods.selective.spt import parse_budget
from mmpeft.methods.shared.plan_file import pack, unpack
from mmpeft.sites import sites
from tests.unit.toy import Toy


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=2, max_size=60), st.data())
def test_threshold_and_exact_count_with_ties(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(1, len(values) - 1))
    whole = torch.tensor(values, dtype=torch.float32)
    parts = {"a": whole[:cut], "b": whole[cut:]}
    assert kth_largest(list(parts.values()), k) == whole.sort(descending=True).values[k - 1]
    masks = top_k_masks(parts, k)
    chosen = torch.cat(list(masks.values()))
    assert int(chosen.sum()) == k
    assert k == len(values) or whole[chosen].min() >= whole[~chosen].max()


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_sparse_product_equals_the_dense_one(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows * columns))
    indices = torch.randperm(rows * columns)[:count].sort().values
    values = torch.randn(count, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, columns, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(rows * columns, dtype=torch.float64).index_put((indices,), values).view(rows, columns)
    weights = torch.randn(3, 2, rows, dtype=torch.float64)
    ours = torch.autograd.grad(
        (sparse_apply(x, values, *compressed(indices, columns, rows)) * weights).sum(), (x, values)
    )
    theirs = torch.autograd.grad((F.linear(x, dense) * weights).sum(), (x, values))
    torch.testing.assert_close(ours, theirs)


@given(st.sets(st.integers(0, 2**31), min_size=1, max_size=50))
def test_indices_survive_being_text(indices: set[int]) -> None:
    flat = torch.tensor(sorted(indices))
    assert torch.equal(unpack(pack(flat), len(flat), 2**31 + 1), flat)


def batches(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 5, 8, generator=generator), torch.tensor([0, 1, 2, 1])) for _ in range(count)]


def pooled(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_fisher_is_the_sum_of_single_squares_and_not_the_square_of_the_mean() -> None:
    torch.manual_seed(0)
    model = Toy()
    name, tensor = next((n, p) for n, p in model.named_parameters() if p.dim() == 2)
    found = score(model, {name: tensor}, "fisher", batches(), pooled)[name]
    expected = torch.zeros_like(tensor)
    for x, y in batches():
        for i in range(4):
            (grad,) = torch.autograd.grad(pooled(model, (x[i : i + 1], y[i : i + 1])), [tensor])
            expected += grad.square()
    torch.testing.assert_close(found, expected)
    by_batch = score(model, {name: tensor}, "gradient2", batches(), pooled)[name]
    assert not torch.allclose(by_batch, expected)
    assert all(p.requires_grad for p in model.parameters())


def test_a_mask_stores_and_optimises_its_entries_only(tmp_path) -> None:
    torch.manual_seed(0)
    model = Toy()
    total = sum(p.numel() for p in model.parameters())
    tuning = mmpeft.attach(model, mmpeft.FishMask(density=0.05, samples=4), data=batches(), loss=pooled)
    trained = sum(p.numel() for p in tuning.parameters())
    assert trained < 0.06 * total
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    pooled(model, batches()[0]).backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "mmpeft" not in n)
    optimizer.step()
    moments = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
    assert sum(m.numel() for m in moments) == 2 * trained
    tuning.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size < 4 * trained + 300 * len(list(tuning.parameters()))


def test_lt_sft_rewinds_to_the_bit() -> None:
    torch.manual_seed(0)
    model = Toy()
    before = {n: p.clone() for n, p in model.named_parameters()}
    mmpeft.LTSFT(density=0.1, steps=3, lr=0.1).resolve(model, batches(), pooled)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("budget", [150, "0.4k", "25%"])
def test_a_plan_counts_exactly_what_trains(budget: float | str, tmp_path) -> None:
    torch.manual_seed(0)
    model = Toy()
    plan = mmpeft.allocate(model, batches(), budget, mmpeft.LoRA(rank=1, at="mlp.*"), loss=pooled)
    assert plan.content["trainable"] <= parse_budget(budget, sum(p.numel() for p in model.parameters()))
    path = plan.save(tmp_path / "plan.json")
    assert json.loads(path.read_text())["encoding"]
    tuning = mmpeft.attach(model, mmpeft.Plan(str(path)))
    trained = sum(p.numel() for p in tuning.parameters())
    assert trained == plan.content["trainable"] == plan.count(model, sites(model))


def test_bad_budgets_empty_data_and_foreign_plans(tmp_path) -> None:
    model = Toy()
    for bad in (0, "-1", "many", "0%"):
        with pytest.raises(ConfigError, match="expected a budget"):
            mmpeft.allocate(model, batches(), bad, loss=pooled)
    with pytest.raises(ConfigError, match="smaller than anything selectable"):
        mmpeft.allocate(model, batches(), 2, mmpeft.LoRA(rank=2, at="mlp.*"), loss=pooled, entries=False)
    with pytest.raises(DataError, match="got no batch"):
        mmpeft.allocate(model, [], "1k", loss=pooled)
    with pytest.raises(DataError, match="data=loader"):
        mmpeft.attach(model, mmpeft.FishMask())
    with pytest.raises(ConfigError, match="set that"):
        mmpeft.attach(model, mmpeft.PaFi().where("depth=0"))
    plan = mmpeft.allocate(model, batches(), "25%", mmpeft.LoRA(rank=1, at="mlp.*"), loss=pooled)
    with pytest.raises(AdapterFileError, match="the plan was made for Toy"):
        mmpeft.attach(nn.Sequential(Toy(width=4))[0], plan)
    (tmp_path / "plan.json").write_text('{"format": "mmpeft-plan", "version": 1')
    with pytest.raises(AdapterFileError, match="only a part"):
        mmpeft.Plan(str(tmp_path / "plan.json"))
    with pytest.raises(AdapterFileError, match="no plan at"):
        mmpeft.Plan(str(tmp_path / "none.json"))
