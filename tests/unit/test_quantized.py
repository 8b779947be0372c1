"""Quantised bases: what their weights do, and adapters that move between a quantised base and the plain one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmpeft
from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats.fingerprint import Fingerprint
from mmpeft.hosting.host import base_value
from mmpeft.hosting.quantized import QuantizedWeight, dense, guard
from tests.matrix.families.quantized import pack, torchao
from tests.unit.toy import Toy

HOLD: dict[str, Callable[[nn.Module], None]] = {
    "torchao8": lambda model: torchao(model, _block),
    "bnb4": lambda model: pack(model, 4, _block),
    "bnb8": lambda model: pack(model, 8, _block),
}
holders = pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
WIDTH = 64


def _block(name: str) -> bool:
    return name.startswith("blocks.")


def _model(seed: int = 0) -> Toy:
    """Vectors with values of their own, as after pretraining."""
    model = Toy(WIDTH, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _held(hold: Callable[[nn.Module], None], seed: int = 0) -> Toy:
    model = _model(seed)
    hold(model)
    return model


def _adapter(model: nn.Module, folder: Path) -> None:
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.q"))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(std=0.1)
    tuning.save(folder)


@holders
def test_a_weight_has_its_true_shape_its_values_and_the_product_of_its_library(
    hold: Callable[[nn.Module], None],
) -> None:
    full, model = _model(), _held(hold)
    layer = model.blocks[0].up
    weight = base_value(layer, "weight")
    assert isinstance(weight, QuantizedWeight)
    assert weight is base_value(layer, "weight")
    assert weight.shape == full.blocks[0].up.weight.shape
    assert 0 < (dense(weight) - full.blocks[0].up.weight).norm() < 0.15 * full.blocks[0].up.weight.norm()
    torch.testing.assert_close(weight.t() + 0, dense(weight).t())
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    y = F.linear(x, weight)
    assert torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad - dense(weight).sum(0)).norm() < 0.05 * grad.norm()


@holders
def test_an_adapter_goes_to_the_base_in_full_and_back(hold: Callable[[nn.Module], None], tmp_path: Path) -> None:
    x = torch.randn(4, 5, WIDTH)
    held, full = _held(hold), _model()
    _adapter(held, tmp_path / "from quantised")
    tuning = mmpeft.load(full, tmp_path / "from quantised")
    few, whole = held(x), full(x)
    assert (few - whole).norm() < 0.2 * (whole - _model()(x)).norm()
    tuning.merge()
    torch.testing.assert_close(full(x), whole, atol=1e-5, rtol=1e-5)
    tuning.unmerge()
    tuning.save(tmp_path / "from full")
    again = _held(hold)
    mmpeft.load(again, tmp_path / "from full")
    assert torch.equal(again(x), few)


@holders
def test_another_base_is_another_in_quantized(hold: Callable[[nn.Module], None], tmp_path: Path) -> None:
    _adapter(_held(hold), tmp_path)
    for other in (_model(seed=1), _held(hold, seed=1)):
        with pytest.raises(AdapterFileError, match="another base"):
            mmpeft.load(other, tmp_path)


@holders
def test_merging_and_training_whole_tensors_are_refused_with_the_way_out(hold: Callable[[nn.Module], None]) -> None:
    model = _held(hold)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.q"))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_()
    before = model(torch.ones(1, 2, WIDTH))
    with pytest.raises(Refused, match=r"blocks.0.q.weight is quantised.*load it on the base without quantisation"):
        tuning.merge()
    assert torch.equal(model(torch.ones(1, 2, WIDTH)), before)
    with pytest.raises(Refused, match="leave it out with `at`"):
        mmpeft.attach(model, mmpeft.Full(), "all")
    assert mmpeft.attach(model, mmpeft.Full(at="norm"), "norms").report().trainable == 4 * WIDTH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_sixteen_bits_leaves_a_base_the_same(dtype: torch.dtype) -> None:
    assert Fingerprint.of(_model().to(dtype)).fits(Fingerprint.of(_model()))
    assert Fingerprint.of(_model().to(dtype).float()).fits(Fingerprint.of(_model().bfloat16()))


def test_a_base_that_was_tuned_further_is_another() -> None:
    base, further = _model(), _model()
    with torch.no_grad():
        further.blocks[1].down.weight.mul_(1 + 0.05 * torch.randn(further.blocks[1].down.weight.shape))
    assert not Fingerprint.of(further).fits(Fingerprint.of(base))
    with torch.no_grad():
        base.blocks[0].norm.weight.mul_(1.05)
    assert not Fingerprint.of(base).fits(Fingerprint.of(_model()))


def test_a_manifest_without_a_sketch_is_compared_by_its_digest() -> None:
    own = Fingerprint.of(_model())
    assert own.fits(Fingerprint.read(own.digest))
    assert not Fingerprint.of(_model().half()).fits(Fingerprint.read(own.digest))
    assert Fingerprint.read(own.facts()) == own


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_that_were_rearranged_for_inference_are_put_back(nested: bool, dtype: torch.dtype) -> None:
    """As a CPU with AVX512-BF16 rearranges them in the first forward pass without gradients; any CPU can try it."""
    bnb, functional = pytest.importorskip("bitsandbytes"), pytest.importorskip("bitsandbytes.functional")
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)
    values = (torch.randn(64, 128) * 0.1).to(dtype)
    layer.weight = bnb.nn.Params4bit(values, False, quant_type="nf4", compress_statistics=nested, module=layer)
    layer.to("cpu").eval()
    before = dense(base_value(layer, "weight")).float()
    guard(layer)
    assert torch.equal(dense(base_value(layer, "weight")).float(), before)
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert (dense(base_value(layer, "weight")).float() - before).abs().max() > 0.1
    guard(layer)
    after = dense(base_value(layer, "weight"))
    assert after.dtype == dtype
    torch.testing.assert_close(after.float(), before, atol=1e-3, rtol=2**-7)  # the scales were rounded to bfloat16
    with torch.no_grad():
        layer(torch.randn(2, 128))
    assert torch.equal(dense(base_value(layer, "weight")), after)
    x = torch.randn(2, 128, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, after.float().sum(0).expand(2, -1), atol=0.02, rtol=0.02)
