"""`attach(..., example=batch)`: a pass that goes past parts is refused, and the model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import SiteError
from mmpeft.sites import Site, anatomy, qualified_name
from tests.unit.toy import Layer, Toy

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Aside(nn.Module):
    """A second block that no pass comes by; experts of which the data choose one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Layer(8), Layer(8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum() > 1e6)](self.used(x))


@anatomy(qualified_name(Aside))
def aside(model: nn.Module) -> list[Site]:
    found = [Site("used.q", "attn.q", 0, kind="linear"), Site("unused.up", "mlp.up", 0, kind="linear")]
    return [*found, *(Site(f"experts.{i}", "proj", 0, kind="linear") for i in range(2))]


def test_what_the_example_comes_by_is_attached() -> None:
    method = mmpeft.LoRA(at="attn.q") + mmpeft.ParallelAdapter(at="block", bottleneck=2)
    tuning = mmpeft.attach(Toy(), method, example=X)
    assert tuning.liveness(X).ok
    mmpeft.attach(Aside(), mmpeft.LoRA(at="attn.q|proj"), example=X)


def test_what_it_goes_past_is_refused() -> None:
    model = Aside()
    before = model(X)
    with pytest.raises(SiteError, match=r"goes past 1 of 2 parts.*mlp\.up at unused\.up"):
        mmpeft.attach(model, mmpeft.LoRA(at="attn.q|mlp.up"), example=(X,))
    assert not mmpeft.tunings(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(X), before)
