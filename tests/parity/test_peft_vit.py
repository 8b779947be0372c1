"""The same weights give the same outputs and gradients as HF PEFT, to 1e-5, on a timm ViT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mmpeft
from tests.matrix.families import FAMILIES
from tests.support.moved import perturb

peft = pytest.importorskip("peft")


def _pair(method: mmpeft.Method, config: object) -> tuple[nn.Module, mmpeft.Tuning, nn.Module, torch.Tensor]:
    model, x, _ = FAMILIES["vit"]()
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    return model, mmpeft.attach(model, method), theirs, x


def _compare(
    model: nn.Module, theirs: nn.Module, x: torch.Tensor, pairs: list[tuple[nn.Parameter, nn.Parameter]]
) -> None:
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.view(other.shape))
    y, reference = model(x), theirs(x)
    torch.testing.assert_close(y, reference, atol=1e-5, rtol=1e-5)
    weights = torch.randn(y.shape)
    mine = torch.autograd.grad((y * weights).sum(), [m for m, _ in pairs])
    other = torch.autograd.grad((reference * weights).sum(), [o for _, o in pairs])
    for a, b in zip(mine, other):
        torch.testing.assert_close(a.view(b.shape), b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rs"])
def test_lora_family(dora: bool, rslora: bool) -> None:
    cls = mmpeft.DoRA if dora else mmpeft.LoRA
    method = cls(at="attn.out|mlp.*", rank=4, alpha=6, rslora=rslora)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=dora, use_rslora=rslora, target_modules=r".*blocks.*(attn\.proj|fc1|fc2)"
    )
    model, tuning, theirs, x = _pair(method, config)
    perturb(tuning, by=0.1)
    pairs = []
    for placement in tuning.placements:
        layer = theirs.base_model.model.get_submodule(placement.home)
        part = placement.part
        pairs += [(part.factor.A, layer.lora_A["default"].weight), (part.factor.B, layer.lora_B["default"].weight)]
        if dora:
            pairs.append((part.magnitude, layer.lora_magnitude_vector["default"].weight))
    assert len(pairs) == 9 * (3 if dora else 2)
    _compare(model, theirs, x, pairs)


def test_ia3() -> None:
    config = peft.IA3Config(target_modules=r".*blocks.*fc2", feedforward_modules=r".*blocks.*fc2")
    model, tuning, theirs, x = _pair(mmpeft.IA3(at="mlp.down"), config)
    perturb(tuning, by=0.1)
    pairs = [(p.part.gamma, theirs.base_model.model.get_submodule(p.home).ia3_l["default"]) for p in tuning.placements]
    _compare(model, theirs, x, pairs)
