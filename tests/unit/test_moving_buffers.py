"""Buffers that a base moves itself: liveness names them, detach names them, and a base that keeps still is silent."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import MovedBuffersWarning, SiteError
from mmpeft.sites import Site, anatomy, qualified_name
from tests.matrix.families import FAMILIES
from tests.unit.toy import Layer

WIDTH = 8


class Codebook(nn.Module):
    """Nearest entry, entries drawn towards what they stand for; and a centre, bound anew (DINO)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, WIDTH))
        self.register_buffer("center", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = torch.ones(x.shape[1])
        if self.training:
            flat = x.detach().flatten(0, -2)
            self.codes[torch.cdist(flat, self.codes).argmin(1)] += 0.01
            self.center = self.center * 0.9 + flat.mean(0) * 0.1
            self.seen += 1
        return x - self.center


class Net(nn.Module):
    def __init__(self, spectral: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Layer(WIDTH), Layer(WIDTH))
        self.book = Codebook()
        self.out = nn.Linear(WIDTH, 3)
        if spectral:
            nn.utils.parametrizations.spectral_norm(self.out)
        self.last = nn.utils.spectral_norm(nn.Linear(3, 3)) if spectral else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.out(self.book(self.blocks(x)).mean(1)))


@anatomy(qualified_name(Net))
def _net(model: nn.Module) -> list[Site]:
    return [Site(f"blocks.{i}.q", "attn.q", i, kind="linear") for i in range(2)]


LORA = mmpeft.LoRA(rank=2, at="attn.q")
BOOK = {"book.codes", "book.center", "book.seen"}
SPECTRAL = {"out.parametrizations.weight.0._u", "out.parametrizations.weight.0._v", "last.weight_u", "last.weight_v"}


@pytest.mark.parametrize(("spectral", "moved"), [(False, BOOK), (True, BOOK | SPECTRAL)])
def test_liveness_names_every_buffer_that_training_moves_and_moves_none(spectral: bool, moved: set[str]) -> None:
    model = Net(spectral).eval()
    before, objects = copy.deepcopy(model.state_dict()), [id(b) for b in model.buffers()]
    tuning = mmpeft.attach(model, LORA)
    found = tuning.liveness(torch.randn(2, 3, WIDTH))
    assert not found.dead
    assert set(found.moved) == moved
    with pytest.raises(SiteError, match=r"book\.codes"):
        found.check()
    tuning.detach()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [id(b) for b in model.buffers()] == objects


def test_detach_names_what_moved_since_attach() -> None:
    model = Net()
    tuning = mmpeft.attach(model, LORA)
    model.train()(torch.randn(2, 3, WIDTH))
    with pytest.warns(MovedBuffersWarning, match=r"3 buffers.*book\.codes"):
        tuning.detach()
    assert type(model) is Net
    again = mmpeft.attach(model, LORA)
    model.eval()(torch.randn(2, 3, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.detach()


def test_a_cast_is_no_move() -> None:
    model = Net()
    tuning = mmpeft.attach(model, LORA)
    model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.detach()


def test_the_first_of_two_tunings_to_go_leaves_the_watch_to_the_last() -> None:
    model = Net()
    first, second = mmpeft.attach(model, LORA, name="a"), mmpeft.attach(model, LORA, name="b")
    model.train()(torch.randn(2, 3, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.detach()
    with pytest.warns(MovedBuffersWarning):
        first.detach()


def _product(site: Site) -> bool:
    return site.kind in ("linear", "conv") and site.depth >= 0 and not site.refuse


@pytest.mark.parametrize("family", FAMILIES)
def test_no_buffer_of_a_family_drifts_in_training_mode(family: str) -> None:
    """The drift invariant for buffers: two training steps under a tuning, then bits compared."""
    example = FAMILIES[family]()
    model = example.model
    before = {n: b.clone() for n, b in model.named_buffers() if n in model.state_dict()}
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at=_product))
    model.train()
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        example().float().square().mean().backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MovedBuffersWarning)
        tuning.detach()
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
