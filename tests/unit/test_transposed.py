"""Updates of transposed convolutions, whose weight [in, out / groups, h, w] is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.methods import Method
from tests.support.moved import perturb


class Upsampler(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 8, 3, 2, 1)
        self.decode = nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.decode(self.encode(x).relu())
        return found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "method",
    [
        mmpeft.LoRA(rank=2, at="path=decode"),
        mmpeft.DoRA(rank=2, at="path=decode"),
        mmpeft.LoHa(rank=2, at="path=decode"),
        mmpeft.LoKr(at="path=decode"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_an_update_is_live_and_merged_exactly(method: Method, groups: int) -> None:
    torch.manual_seed(0)
    model, x = Upsampler(groups), torch.randn(2, 3, 8, 8)
    plain = model(x)
    tuning = mmpeft.attach(model, method, example=x)
    perturb(tuning)
    tuned = model(x)
    tuned.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuning.parameters())
    assert not torch.allclose(tuned, plain, atol=1e-3)
    tuning.merge()
    torch.testing.assert_close(model(x), tuned)


def test_dropout_of_what_enters_is_refused() -> None:
    model = Upsampler(1)
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=r"dropout=0.1 does not reach transposed convolutions"):
        mmpeft.attach(model, mmpeft.LoRA(at="path=decode", dropout=0.1), example=torch.randn(2, 3, 8, 8))
    assert list(model.state_dict()) == keys
