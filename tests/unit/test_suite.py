"""What the suite itself stands on."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from tests.support import shares
from tests.support.copies import Copies


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.head.weight.requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("table", torch.arange(3).expand(2, 3), persistent=False)


def test_a_copy_is_equal_and_nobody_elses() -> None:
    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(Tied())
        return built[-1]

    make = Copies(build)
    one, other = make(), make()
    assert len(built) == 1
    for copy in (one, other):
        assert type(copy) is Tied
        assert copy.head.weight is copy.embed.weight
        assert isinstance(copy.head.weight, nn.Parameter)
        assert not copy.head.weight.requires_grad
        assert torch.equal(copy.table, built[0].table)
        assert list(copy.state_dict()) == list(built[0].state_dict())
        assert all(torch.equal(a, b) for a, b in zip(copy.state_dict().values(), built[0].state_dict().values()))
    with torch.no_grad():
        for tensor in (*one.state_dict().values(), one.table.contiguous()):
            tensor.add_(1)
        one.table = one.table + 1
        one.norm.train()
    for untouched in (other, make()):
        assert all(torch.equal(a, b) for a, b in zip(untouched.state_dict().values(), built[0].state_dict().values()))
        assert torch.equal(untouched.table, built[0].table)


def test_every_turn_has_every_key_and_all_turns_every_cell() -> None:
    """Also where a key has fewer cells than there are turns."""
    cells = [(method, family) for method in "abcd" for family in range(12) if method != "d" or family < 2]
    found = shares.turns(cells, lambda cell: cell)
    assert all(found.values())
    for turn in range(shares.ROUND):
        today = [cell for cell in cells if turn in found[cell]]
        assert {method for method, _ in today} == set("abcd")
        assert {family for _, family in today} == set(range(12))
        assert len(today) < len(cells)
    round_ = [shares.of_today(cells, lambda cell: cell, seed=str(seed)) for seed in range(3, 3 + shares.ROUND)]
    assert {cell for today in round_ for cell in today} == set(cells)
    assert shares.of_today(cells, lambda cell: cell, shift=2, seed="5") == shares.of_today(
        cells, lambda cell: cell, seed=str(7 + shares.ROUND)
    )
    assert shares.of_today(cells, lambda cell: cell, seed="all") == cells


def test_the_seed_is_that_of_the_day_unless_said_and_workers_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shares.VARIABLE, "")
    today = str(int(time.time() // 86400))
    assert shares.settle(None) in (today, str(int(today) + 1))
    assert shares.settle("12") == "12"
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert shares.settle(None) == "12"  # a worker that starts after midnight
    with pytest.raises(ValueError, match="a number or 'all', got 'tuesday'"):
        shares.settle("tuesday")
