"""accelerate: offloaded and dispatched models run with the adapter in effect, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmpeft
from mmpeft.combine.interpolate import interpolate
from mmpeft.errors import MMPEFTError, Refused
from tests.compat.hooked import HOOKS, answer, pair
from tests.compat.models import ALL, bend, causal, close, differ, plain, untouched, words
from tests.compat.rows import row
from tests.matrix.cells import rows as methods

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@row(
    "accelerate",
    "`cpu_offload`, `disk_offload`, `dispatch_model`, `AlignDevicesHook` before `attach`",
    "the answers of the merged plain model",
)
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_hooks_before_attach(hook: str, tmp_path: Path) -> None:
    model, before, method = pair()
    HOOKS[hook](model, tmp_path)
    close(answer(model), answer(before))
    tuning = mmpeft.attach(model, method)
    close(answer(model), answer(before))
    bend(tuning)
    expected = plain(tuning, before)
    differ(answer(model), answer(before))
    close(answer(model), answer(expected))
    with mmpeft.use(model, None):
        close(answer(model), answer(before))


@row(
    "accelerate",
    "the same after `attach`",
    "the answers of the merged plain model",
)
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_hooks_after_attach(hook: str, tmp_path: Path) -> None:
    model, before, method = pair()
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    HOOKS[hook](model, tmp_path)
    differ(answer(model), answer(before))
    close(answer(model), answer(expected))
    close(answer(model), answer(expected))  # loaded and offloaded again


@row(
    "accelerate",
    "hooks added before `attach`, removed after it; detach before and after the removal",
    "the adapter stays in effect; the model is plain after detach",
)
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_hooks_removed_after_attach(hook: str, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model, before, method = pair()
    HOOKS[hook](model, tmp_path)
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    remove_hook_from_module(model, recurse=True)
    differ(answer(model), answer(before))
    close(answer(model), answer(expected))
    tuning.detach()
    close(answer(model), answer(before))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


@row("accelerate", "detach while hooks are on, removal afterwards", "the plain model at every step")
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_detached_before_the_hooks_go(hook: str, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model, before, method = pair()
    HOOKS[hook](model, tmp_path)
    tuning = bend(mmpeft.attach(model, method))
    tuning.detach()
    close(answer(model), answer(before))
    remove_hook_from_module(model, recurse=True)
    close(answer(model), answer(before))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


@row(
    "accelerate",
    "merge, save, a second `attach`, DoRA and `generate` on an offloaded model",
    "exact; `merge` is refused, with the hooks to remove first",
)
@pytest.mark.parametrize("hook", ["cpu", "disk", "map"])
@torch.no_grad()
def test_work_on_an_offloaded_model(hook: str, tmp_path: Path) -> None:
    model, before, method = pair()
    (tmp_path / "off").mkdir()
    HOOKS[hook](model, tmp_path / "off")
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    tuning.save(tmp_path / "saved")
    fresh = untouched(before)
    mmpeft.load(fresh, tmp_path / "saved")
    close(answer(fresh), answer(expected))
    with pytest.raises(Refused, match="remove the hooks"):
        tuning.merge()
    close(answer(model), answer(expected))
    text = model.generate(words(2), max_new_tokens=4, do_sample=False)
    assert torch.equal(text, expected.generate(words(2), max_new_tokens=4, do_sample=False))
    other = mmpeft.attach(model, mmpeft.DoRA(rank=2, at="attn.q"), name="dora")
    close(answer(model), answer(before))
    twin = untouched(before)
    same = mmpeft.attach(twin, mmpeft.DoRA(rank=2, at="attn.q"))
    for one, two in zip(other.parameters(), same.parameters(), strict=True):
        two.copy_(one.add_(0.1))
    close(answer(model), answer(twin), 1e-4)


@row(
    "accelerate",
    "`init_empty_weights`, then `load_checkpoint_and_dispatch`; attach before and after the load",
    "the answers of the merged plain model after the load; refused before it, as there are no weights",
)
@pytest.mark.parametrize("order", ["after", "before"])
@torch.no_grad()
def test_big_models_are_loaded(order: str, tmp_path: Path) -> None:
    import transformers as hf
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from safetensors.torch import save_file

    before = causal(tie_word_embeddings=False)
    save_file({n: t.contiguous() for n, t in before.state_dict().items()}, tmp_path / "model.safetensors")
    with init_empty_weights():
        model = hf.LlamaForCausalLM(before.config).eval()
    method = mmpeft.LoRA(rank=2, at=ALL)
    if order == "before":
        with pytest.raises(Refused, match="load the weights, then attach"):
            mmpeft.attach(model, method)
    device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map["model.rotary_emb"] = "cpu"
    load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map, force_hooks=True, strict=False)
    for ours, theirs in zip(model.model.buffers(), before.model.buffers(), strict=False):
        ours.copy_(theirs)
    tuning = mmpeft.attach(model, method)
    close(answer(model), answer(before))
    bend(tuning)
    close(answer(model), answer(plain(tuning, before)))


METHODS = {label: method for label, method in methods().items() if method.decided}


@row(
    "accelerate",
    "every method on an offloaded model: `cpu_offload` and `disk_offload`, before and after `attach`",
    "the answers of the model that is not offloaded",
)
@pytest.mark.parametrize("label", METHODS)
@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
def test_every_method_is_offloaded(label: str, order: str, tmp_path: Path) -> None:
    for hook in ("cpu", "disk"):
        model = causal(tie_word_embeddings=False)
        twin, before = untouched(model), untouched(model)
        (tmp_path / hook).mkdir()
        if order == "before":
            HOOKS[hook](model, tmp_path / hook)
        try:
            same = mmpeft.attach(twin, METHODS[label])
        except MMPEFTError:  # no place for it in a language model, offloaded or not
            with pytest.raises(MMPEFTError):
                mmpeft.attach(model, METHODS[label])
            return
        tuning = bend(mmpeft.attach(model, METHODS[label]))
        same.load_state_dict(tuning.state_dict())
        expected = answer(twin)
        differ(expected, answer(before))
        if order == "after":
            HOOKS[hook](model, tmp_path / hook)
        close(answer(model), expected)


@row(
    "accelerate",
    "training with a base on the CPU or the disk: hooks before and after `attach`, the optimiser made before them",
    "the parts trained as with the base in place",
)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("hook", ["cpu", "disk"])
def test_parts_train_on_an_offloaded_base(hook: str, order: str, tmp_path: Path) -> None:
    model, before, method = pair()
    if order == "before":
        HOOKS[hook](model, tmp_path)
    tuning, twin = bend(mmpeft.attach(model, method)), bend(mmpeft.attach(before, method))
    twin.load_state_dict(tuning.state_dict())
    optimizers = [torch.optim.SGD(list(t.parameters()), lr=0.1) for t in (tuning, twin)]
    if order == "after":
        HOOKS[hook](model, tmp_path)
    for one, optimizer in zip((model, before), optimizers):
        for _ in range(2):
            optimizer.zero_grad()
            answer(one).square().mean().backward()
            optimizer.step()
    held = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in tuning.parameters()} == held, "the optimiser holds other tensors than those that run"
    for name, value in twin.state_dict().items():
        close(tuning.state_dict()[name], value)


@row(
    "accelerate",
    "`merge`, `unmerge`, `save_merged`, `export` and `interpolate` while the base is on the CPU or the disk",
    "refused before anything changes, with the hooks to remove; `save` and `export` of the adapter are exact",
)
@pytest.mark.parametrize("hook", ["cpu", "disk", "map"])
@torch.no_grad()
def test_merging_into_weights_that_are_elsewhere(hook: str, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model, before, method = pair()
    HOOKS[hook](model, tmp_path)
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    for work in (
        tuning.merge,
        lambda: tuning.save_merged(tmp_path / "m"),
        lambda: interpolate(tuning, 0.5).__enter__(),
    ):
        with pytest.raises(Refused, match="remove"):
            work()
        close(answer(model), answer(expected))
    assert not (tmp_path / "m").exists()
    tuning.export(tmp_path / "peft", verify=False)
    twin = untouched(before)
    mmpeft.load_foreign(twin, tmp_path / "peft")
    close(answer(twin), answer(expected), 1e-4)
    remove_hook_from_submodules(model)
    tuning.merge()
    close(answer(model), answer(expected), 1e-4)
    HOOKS[hook](model, tmp_path / "again")
    with pytest.raises(Refused, match="remove"):
        tuning.unmerge()
    close(answer(model), answer(expected), 1e-4)
    remove_hook_from_submodules(model)
    tuning.unmerge()
    close(answer(model), answer(expected))
    tuning.detach()
    close(answer(model), answer(before))


@row(
    "accelerate",
    "`attach` inside `init_empty_weights`, to a model without values, under `preload_module_classes`",
    "refused: load the weights, then attach",
)
@torch.no_grad()
def test_parts_without_values_are_refused(tmp_path: Path) -> None:
    from accelerate import cpu_offload, init_empty_weights

    model, before, method = pair()
    with init_empty_weights(), pytest.raises(Refused, match="load the weights, then attach"):
        mmpeft.attach(model, method)
    close(answer(model), answer(before))
    with pytest.raises(Refused, match="load the weights, then attach"):
        mmpeft.attach(untouched(before).to("meta"), method)
    options = {"execution_device": torch.device("cpu"), "preload_module_classes": ["LlamaDecoderLayer"]}
    cpu_offload(model, **options)
    with pytest.raises(Refused, match="load the weights, then attach"):
        mmpeft.attach(model, method)
    close(answer(model), answer(before))
    mmpeft.attach(before, method)
    cpu_offload(before, **options)
    with pytest.raises(Refused, match="preload_module_classes"):
        answer(before)
