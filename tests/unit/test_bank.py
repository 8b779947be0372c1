"""The bank: many entries on one frozen model, each sample routed for itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.bank import Bank, LinearHead, PrototypeHead, RidgeHead
from mmpeft.errors import ConfigError, DataError, Refused
from mmpeft.hosting.host import is_host
from mmpeft.surgery.together import Together
from tests.support.moved import redraw
from tests.unit.filled_bank import KINDS, X, filled
from tests.unit.toy import Toy


def extract(model: nn.Module, x: Tensor) -> Tensor:
    return model.blocks(x).mean(1) if not is_host(model) else model(x)


def snapshot(bank: Bank, name: str) -> list[Tensor]:
    entry = bank[name]
    own = [*bank.parameters_of(name), *entry.buffers(), *entry.state.values()]
    return [t.detach().clone() for t in own]


def test_a_row_is_the_same_alone_shuffled_and_beside_other_entries() -> None:
    bank = filled()
    rows = ["lora", "adapter", None, "full", "wide", "lora"]
    mixed = bank.features(X, rows)
    for i, name in enumerate(rows):
        assert torch.allclose(mixed[i], bank.features(X[i : i + 1], name)[0], atol=1e-6)
    order = [3, 0, 5, 2, 1, 4]
    shuffled = bank.features(X[order], [rows[i] for i in order])
    assert torch.allclose(shuffled, mixed[order], atol=1e-6)


def test_routing_by_key_and_prototype_looks_at_each_row_alone() -> None:
    bank = filled({"a": KINDS["lora"], "b": KINDS["wide"]})
    query = bank.query(X)
    for i, name in enumerate(("a", "b")):
        bank[name].head = PrototypeHead(3)
        bank[name].head.fit(query[i::2], torch.arange(3) + 10 * i)
        bank[name].state["key"] = query[i::2]
    for by in ("key", "prototype"):
        together = bank.route(query, by).names()
        assert together == [("a",), ("b",)] * 3
        assert [bank.route(query[i : i + 1], by).names()[0] for i in range(6)] == together
    assert bank.route(query, "key", top=2).index.shape == (6, 2)
    assert bank.route([1, 0], "task").names() == [("b",), ("a",)]
    assert bank.route(["b"], "name").routes("a") == [Together(("a", "b"))]


def test_the_query_is_the_plain_model_itself() -> None:
    model = Toy()
    plain = model(X)
    bank = Bank(model)
    bank.add_task("a", KINDS["full"])
    redraw(bank.tuning("a").parameters(), seed=0)
    assert not torch.allclose(bank.features(X, "a"), plain)
    bank.train()
    assert torch.equal(bank.query(X), plain)
    assert bank.training
    assert bank.model is model
    assert sum(isinstance(m, Toy) for m in bank.modules()) == 1


@pytest.mark.parametrize("weights", [None, (0.5, -2.0), (torch.tensor(0.5), torch.tensor(-2.0))])
@pytest.mark.parametrize("mixed", [False, True])
def test_updates_run_together_as_their_weighted_sum(weights, mixed: bool) -> None:
    bank = filled()
    entry = Together(("lora", "wide"), weights)
    found = bank.features(X, [entry, None] * 3 if mixed else entry)
    model = Toy()
    for name, weight in zip(("lora", "wide"), weights or (1.0, 1.0)):
        for p in bank.tuning(name).placements:
            module = model.get_submodule(p.home)
            module.weight.data += float(weight) * p.part.scale * p.part.factor.materialise().detach()
    expected = model(X)
    if mixed:
        expected[1::2] = Toy()(X)[1::2]
    assert torch.allclose(found, expected, atol=1e-5)


def test_weights_train_and_unit_means_direction() -> None:
    bank = filled()
    weight = nn.Parameter(torch.tensor(0.8))
    entry = Together(("lora", "wide"), (weight, 1.0), unit=("lora",))
    bank.features(X, entry).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0
    before = bank.features(X, entry)
    for p in bank.tuning("lora").parameters():
        p.data.mul_(5.0)
    assert torch.allclose(bank.features(X, entry), before, atol=1e-5)


def test_copies_and_pickles_carry_what_runs_together() -> None:
    bank = filled()
    with bank.using(Together(("lora", "wide"), (2.0, 1.0))):
        expected = bank.model(X)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(bank)))
        assert torch.equal(twin.model(X), expected)


@pytest.mark.parametrize(
    ("methods", "weights", "reason"),
    [
        ((mmpeft.DoRA(at="attn.q"), KINDS["lora"]), None, "DoRA"),
        ((KINDS["adapter"], mmpeft.ParallelAdapter(at="block", bottleneck=4)), None, "does not add up|merged"),
        ((KINDS["adapter"], KINDS["lora"]), (torch.tensor(0.5), 0.5), "weighted"),
        ((KINDS["full"], mmpeft.BitFit()), None, "add up"),
    ],
)
def test_what_is_no_sum_is_refused(methods, weights, reason: str) -> None:
    bank = filled({"a": methods[0], "b": methods[1]})
    with pytest.raises(Refused, match=reason):
        bank.features(X, Together(("a", "b"), weights))
    if not weights:
        with pytest.raises(Refused, match=f"merged|{reason}"):
            bank.merge(["a", "b"])
        assert bank.ids == ["a", "b"]


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0), (0.3, -1.0, 2.0)])
def test_merge_equals_the_composed_forward(weights) -> None:
    names = {"a": KINDS["lora"], "b": KINDS["wide"], "c": mmpeft.LoRA(at="mlp.*", rank=7)}
    bank = filled(names)
    before = {name: snapshot(bank, name) for name in names}
    bank.merge(list(names), weights, into="sum")
    expected = bank.features(X, Together(tuple(names), weights or (1 / 3,) * 3))
    assert torch.allclose(bank.features(X, "sum"), expected, atol=1e-5)
    for name in names:
        assert all(map(torch.equal, snapshot(bank, name), before[name]))


def test_folding_keeps_memory_flat_and_the_sum_exact() -> None:
    bank, plain = filled({"past": KINDS["wide"]}), filled({"past": KINDS["wide"]})
    sizes = []
    for t in range(6):
        for own in (bank, plain):
            own.add_task(f"t{t}", KINDS["wide"])
            redraw(own.tuning(f"t{t}").parameters(), seed=100 + t)
        bank.fold(["past", f"t{t}"], into="past")
        sizes.append(sum(p.numel() for p in bank.parameters_of("past")))
    assert len(bank) == 1
    assert sizes[-1] == sizes[-3]
    expected = plain.features(X, Together(tuple(plain.ids)))
    assert torch.allclose(bank.features(X, "past"), expected, rtol=1e-4, atol=1e-5)


def test_old_entries_do_not_move_and_freezing_is_not_activation() -> None:
    bank = filled({"old": KINDS["wide"]})
    bank["old"].head = LinearHead(3, range(3))
    bank["old"].learned["key"] = nn.Parameter(torch.randn(1, 3))
    bank.freeze("old")
    before = snapshot(bank, "old")
    base = {k: v.clone() for k, v in bank.model.state_dict().items() if "mmpeft" not in k}
    bank.add_task("new", KINDS["wide"], LinearHead(3, range(3, 6)))
    optimizer = torch.optim.AdamW(bank.trainable_parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        features = bank.features(X, Together(("old", "new")))  # the frozen entry runs
        bank["new"].head(features).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, snapshot(bank, "old"), before))
    assert all(torch.equal(v, base[k]) for k, v in bank.model.state_dict().items() if k in base)
    bank.unfreeze("old")
    assert len(bank.trainable_parameters()) > len(optimizer.param_groups[0]["params"])


def test_prototypes_do_not_depend_on_the_increment_and_ridge_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 6
    once, steps, ridge = PrototypeHead(4), PrototypeHead(4), RidgeHead(4, size=32)
    once.fit(features, labels)
    for classes in ((4, 1), (0, 5), (2, 3)):
        own = (labels[:, None] == torch.tensor(classes)).any(1)
        steps.fit(features[own], labels[own])
        ridge.fit(features[own], labels[own])
    at = steps.columns(once.labels)
    assert torch.allclose(once(features), steps(features)[:, at], atol=1e-6)
    h = ridge.project(features).double()
    y = torch.nn.functional.one_hot(ridge.columns(labels), 6).double()
    expected = torch.linalg.solve(h.T @ h + ridge.strength * torch.eye(32), h.T @ y)
    assert torch.allclose(ridge(features).double(), h @ expected, atol=1e-3)


def test_bad_input() -> None:
    bank = filled({"birds": KINDS["lora"]})
    with pytest.raises(ConfigError, match=r"no entry 'bird'.*Did you mean 'birds'"):
        bank.features(X, ["bird"] * 6)
    with pytest.raises(ConfigError, match="already"):
        bank.add_task("birds", KINDS["lora"])
    with pytest.raises(ConfigError, match="identifier"):
        bank.add_task("a b")
    with pytest.raises(ConfigError, match="keys"):
        bank.route(bank.query(X), "key")
    with pytest.raises(ConfigError, match="none of the 1 entries"):
        bank.route([3], "task")
    with pytest.raises(ConfigError, match="an adapter for 4 rows"):
        bank.features(X, ["birds", None] * 2)
    with pytest.raises(DataError, match="outside this task"):
        LinearHead(3, [4, 5]).columns(torch.tensor([4, 6]))
    with pytest.raises(DataError, match="no samples"):
        PrototypeHead(3).fit(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ConfigError, match="different names"):
        Together(("a", "a"))
    with pytest.raises(ConfigError, match="weights"):
        Together(("a", "b"), (1.0,))
    bank.add_task("bare")
    with pytest.raises(Refused, match="tunes nothing"):
        bank.merge(["birds", "bare"])
