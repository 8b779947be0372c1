"""What the suite itself stands on."""

from __future__ import annotations

import torch
from torch import nn

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
