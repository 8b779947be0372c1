"""accelerate: prepared models, hooks that come and go, sizes: the adapter in effect, or refused."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import Refused
from tests.compat.hooked import aligned, answer, cpu, pair
from tests.compat.models import ALL, bend, close, gradients, images, near, plain, untouched, vit
from tests.compat.rows import row

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@row("accelerate", "hooks added after `attach`, removed, added again; detach", "the adapter in effect until detach")
@torch.no_grad()
def test_hooks_come_and_go(tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model, before, method = pair()
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    for _ in range(2):
        aligned(model, tmp_path)
        close(answer(model), answer(expected))
        remove_hook_from_module(model, recurse=True)
        close(answer(model), answer(expected))
    cpu(model, tmp_path)
    remove_hook_from_module(model, recurse=True)
    close(answer(model), answer(expected))
    tuning.detach()
    close(answer(model), answer(before))


@row(
    "accelerate",
    "a hook of one's own (`ModelHook`, `SequentialHook`) on a tuned layer, before and after `attach`",
    "the hook sees the layer's input and its output with the adapter in it",
)
@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
def test_own_hooks(order: str) -> None:
    from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module

    class Doubles(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tuple(2 * a for a in args), kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output + 1

    def hooked(one: Any) -> None:
        add_hook_to_module(one.blocks[0].mlp.fc1, SequentialHook(Doubles(), Doubles()))

    model = vit()
    before = untouched(model)
    if order == "before":
        hooked(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)))
    if order == "after":
        hooked(model)
    expected = plain(tuning, before)
    hooked(expected)
    close(model(images()), expected(images()))
    remove_hook_from_module(model.blocks[0].mlp.fc1)
    close(model(images()), plain(tuning, before)(images()))


@row(
    "accelerate",
    "a second `attach`, `use`, `detach` of one of two after the hooks of a tuned model have gone again",
    "the tunings in use are in effect",
)
@torch.no_grad()
def test_tunings_change_after_hooks(tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model, before, method = pair()
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    aligned(model, tmp_path)
    remove_hook_from_submodules(model)
    other = bend(mmpeft.attach(model, mmpeft.LoRA(rank=3, at="attn.*"), name="other"))
    close(answer(model), answer(plain(other, before)))
    mmpeft.use(model, "default")
    close(answer(model), answer(expected))
    cpu(model, tmp_path)
    close(answer(model), answer(expected))
    with mmpeft.use(model, "other"):
        close(answer(model), answer(plain(other, before)))
    other.detach()
    close(answer(model), answer(expected))


@row(
    "accelerate",
    "layers that are cast to 8 bits between passes (`LayerwiseCastingHook`, diffusers' too)",
    "refused: the parts under them would be cast too",
)
@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
def test_layerwise_casting(library: str) -> None:
    if library == "accelerate":
        from accelerate.big_modeling import attach_layerwise_casting_hooks as cast_layers
    else:
        from diffusers.hooks import apply_layerwise_casting as cast_layers

    types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    model, _, method = pair()
    after = untouched(model)
    cast_layers(model, **types)
    with pytest.raises(Refused, match="is quantised"):
        mmpeft.attach(model, method)
    if library == "accelerate":
        mmpeft.attach(after, method)
        with pytest.raises(Refused, match="is quantised"):
            cast_layers(after, **types)


@row("accelerate", "`Accelerator.prepare` of model, optimiser and loader; accumulation, clipping, bf16, `unwrap_model`")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_training(precision: str) -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)))
    expected = plain(tuning, before)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    loader = DataLoader(list(images(8)), batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert accelerator.unwrap_model(prepared) is model
    reference = accelerator.prepare_model(expected, evaluation_mode=True)
    was = {n: p.detach().clone() for n, p in tuning.named_parameters()}
    with torch.no_grad():
        near(prepared(images()), reference(images()), 1e-4 if precision == "no" else 0.05)
    for batch in loader:
        with accelerator.accumulate(prepared):
            loss = prepared(batch).square().mean()
            loss /= 2
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
    assert all(not torch.equal(p, was[n]) for n, p in tuning.named_parameters())
    saved = accelerator.get_state_dict(prepared)
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    state = copy.deepcopy(tuning.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        bend(tuning)
        accelerator.load_state(folder)
    assert all(torch.equal(state[n], t) for n, t in tuning.state_dict().items())
    plain_again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    tuning.detach()
    close(plain_again(images()), before(images()))


@row(
    "accelerate",
    "`prepare` before `attach` (bf16 patches the model's forward), later `detach`",
    "the adapter in effect and trained; the prepared model after detach",
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_attached_to_a_prepared_model(precision: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = vit()
    before = untouched(model)
    prepared = accelerator.prepare_model(model)
    target = accelerator.unwrap_model(prepared)
    tuning = bend(mmpeft.attach(target, mmpeft.LoRA(rank=2, at=ALL)))
    reference = accelerator.prepare_model(plain(tuning, before))
    near(prepared(images()), reference(images()), 1e-4 if precision == "no" else 0.05)
    prepared(images()).square().sum().backward()
    assert len(gradients(tuning)) == len(list(tuning.parameters()))
    tuning.detach()
    reference = accelerator.prepare_model(untouched(before))
    assert torch.equal(prepared(images()), reference(images()))


@row(
    "accelerate",
    "`find_executable_batch_size`, `infer_auto_device_map`, `compute_module_sizes` on a tuned model",
    "sizes and maps cover base and adapter",
)
def test_sizes_and_maps() -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    model, before, method = pair()
    tuning = mmpeft.attach(model, method)
    own = sum(p.numel() * p.element_size() for p in tuning.parameters())
    assert compute_module_sizes(model)[""] == compute_module_sizes(before)[""] + own
    found = infer_auto_device_map(model, {"cpu": 10**9}, no_split_module_classes=["LlamaDecoderLayer"], verbose=False)
    assert found == {"": "cpu"}
    small = infer_auto_device_map(model, {"cpu": 30_000, "disk": 10**9}, no_split_module_classes=["LlamaDecoderLayer"])
    assert not [name for name in small if "layers.0." in name or "layers.1." in name], "a block was split"
