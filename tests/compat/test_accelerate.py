"""accelerate: prepared, offloaded and dispatched models run with the adapter in effect, or are refused."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.combine.interpolate import interpolate
from mmpeft.errors import MMPEFTError, Refused
from mmpeft.formats.exchange import load_foreign
from tests.compat.models import ALL, bend, causal, close, differ, gradients, images, near, plain, untouched, vit, words
from tests.compat.rows import row
from tests.matrix.cells import rows as methods


def _cpu(model: Any, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def _disk(model: Any, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def _map(model: Any, folder: Path) -> None:
    """Half the blocks on the CPU, the others on the disk."""
    from accelerate import dispatch_model

    names = [name for name, module in model.named_children() if list(module.parameters(recurse=True))]
    device_map: dict[str, Any] = {}
    for name in names:
        child = getattr(model, name)
        inner = getattr(child, "layers", None)
        if inner is None:
            device_map[name] = "cpu"
            continue
        for part, module in child.named_children():
            if part != "layers" and list(module.parameters()):
                device_map[f"{name}.{part}"] = "cpu"
            elif part == "layers":
                device_map |= {f"{name}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(module))}
            else:
                device_map[f"{name}.{part}"] = "cpu"
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def _aligned(model: Any, folder: Path) -> None:
    """A hook on every module and nothing moved: what a model on several accelerators has."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True), append=True)


@pytest.fixture(autouse=True)
def _state() -> Any:
    """accelerate keeps its settings for the process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


HOOKS: dict[str, Callable[[Any, Path], None]] = {"cpu": _cpu, "disk": _disk, "map": _map, "aligned": _aligned}


def _answer(model: Any) -> torch.Tensor:
    return model(words()).logits


def _pair() -> tuple[Any, Any, Any]:
    """A model, its untouched copy and the method."""
    model = causal(tie_word_embeddings=False)
    return model, untouched(model), mmpeft.LoRA(rank=2, at=ALL)


@row(
    "accelerate",
    "`cpu_offload`, `disk_offload`, `dispatch_model`, `AlignDevicesHook` before `attach`",
    "the answers of the merged plain model",
)
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_hooks_before_attach(hook: str, tmp_path: Path) -> None:
    model, before, method = _pair()
    HOOKS[hook](model, tmp_path)
    close(_answer(model), _answer(before))
    tuning = mmpeft.attach(model, method)
    close(_answer(model), _answer(before))
    bend(tuning)
    expected = plain(tuning, before)
    differ(_answer(model), _answer(before))
    close(_answer(model), _answer(expected))
    with mmpeft.use(model, None):
        close(_answer(model), _answer(before))


@row(
    "accelerate",
    "the same after `attach`",
    "the answers of the merged plain model",
)
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_hooks_after_attach(hook: str, tmp_path: Path) -> None:
    model, before, method = _pair()
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    HOOKS[hook](model, tmp_path)
    differ(_answer(model), _answer(before))
    close(_answer(model), _answer(expected))
    close(_answer(model), _answer(expected))  # loaded and offloaded again


@row(
    "accelerate",
    "hooks added before `attach`, removed after it; detach before and after the removal",
    "the adapter stays in effect; the model is plain after detach",
)
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_hooks_removed_after_attach(hook: str, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model, before, method = _pair()
    HOOKS[hook](model, tmp_path)
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    remove_hook_from_module(model, recurse=True)
    differ(_answer(model), _answer(before))
    close(_answer(model), _answer(expected))
    tuning.detach()
    close(_answer(model), _answer(before))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


@row("accelerate", "detach while hooks are on, removal afterwards", "the plain model at every step")
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_detached_before_the_hooks_go(hook: str, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model, before, method = _pair()
    HOOKS[hook](model, tmp_path)
    tuning = bend(mmpeft.attach(model, method))
    tuning.detach()
    close(_answer(model), _answer(before))
    remove_hook_from_module(model, recurse=True)
    close(_answer(model), _answer(before))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


@row("accelerate", "hooks added after `attach`, removed, added again; detach", "the adapter in effect until detach")
@torch.no_grad()
def test_hooks_come_and_go(tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model, before, method = _pair()
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    for _ in range(2):
        _aligned(model, tmp_path)
        close(_answer(model), _answer(expected))
        remove_hook_from_module(model, recurse=True)
        close(_answer(model), _answer(expected))
    _cpu(model, tmp_path)
    remove_hook_from_module(model, recurse=True)
    close(_answer(model), _answer(expected))
    tuning.detach()
    close(_answer(model), _answer(before))


@row(
    "accelerate",
    "merge, save, a second `attach`, DoRA and `generate` on an offloaded model",
    "exact; `merge` is refused, with the hooks to remove first",
)
@pytest.mark.parametrize("hook", ["cpu", "disk", "map"])
@torch.no_grad()
def test_work_on_an_offloaded_model(hook: str, tmp_path: Path) -> None:
    model, before, method = _pair()
    (tmp_path / "off").mkdir()
    HOOKS[hook](model, tmp_path / "off")
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    tuning.save(tmp_path / "saved")
    fresh = untouched(before)
    mmpeft.load(fresh, tmp_path / "saved")
    close(_answer(fresh), _answer(expected))
    with pytest.raises(Refused, match="remove the hooks"):
        tuning.merge()
    close(_answer(model), _answer(expected))
    text = model.generate(words(2), max_new_tokens=4, do_sample=False)
    assert torch.equal(text, expected.generate(words(2), max_new_tokens=4, do_sample=False))
    other = mmpeft.attach(model, mmpeft.DoRA(rank=2, at="attn.q"), name="dora")
    close(_answer(model), _answer(before))
    twin = untouched(before)
    same = mmpeft.attach(twin, mmpeft.DoRA(rank=2, at="attn.q"))
    for one, two in zip(other.parameters(), same.parameters(), strict=True):
        two.copy_(one.add_(0.1))
    close(_answer(model), _answer(twin), 1e-4)


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
    close(_answer(model), _answer(before))
    bend(tuning)
    close(_answer(model), _answer(plain(tuning, before)))


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

    model, before, method = _pair()
    tuning = mmpeft.attach(model, method)
    own = sum(p.numel() * p.element_size() for p in tuning.parameters())
    assert compute_module_sizes(model)[""] == compute_module_sizes(before)[""] + own
    found = infer_auto_device_map(model, {"cpu": 10**9}, no_split_module_classes=["LlamaDecoderLayer"], verbose=False)
    assert found == {"": "cpu"}
    small = infer_auto_device_map(model, {"cpu": 30_000, "disk": 10**9}, no_split_module_classes=["LlamaDecoderLayer"])
    assert not [name for name in small if "layers.0." in name or "layers.1." in name], "a block was split"


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
        expected = _answer(twin)
        differ(expected, _answer(before))
        if order == "after":
            HOOKS[hook](model, tmp_path / hook)
        close(_answer(model), expected)


@row(
    "accelerate",
    "training with a base on the CPU or the disk: hooks before and after `attach`, the optimiser made before them",
    "the parts trained as with the base in place",
)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("hook", ["cpu", "disk"])
def test_parts_train_on_an_offloaded_base(hook: str, order: str, tmp_path: Path) -> None:
    model, before, method = _pair()
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
            _answer(one).square().mean().backward()
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

    model, before, method = _pair()
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
        close(_answer(model), _answer(expected))
    assert not (tmp_path / "m").exists()
    tuning.export(tmp_path / "peft", verify=False)
    twin = untouched(before)
    load_foreign(twin, tmp_path / "peft")
    close(_answer(twin), _answer(expected), 1e-4)
    remove_hook_from_submodules(model)
    tuning.merge()
    close(_answer(model), _answer(expected), 1e-4)
    HOOKS[hook](model, tmp_path / "again")
    with pytest.raises(Refused, match="remove"):
        tuning.unmerge()
    close(_answer(model), _answer(expected), 1e-4)
    remove_hook_from_submodules(model)
    tuning.unmerge()
    close(_answer(model), _answer(expected))
    tuning.detach()
    close(_answer(model), _answer(before))


@row(
    "accelerate",
    "`attach` inside `init_empty_weights`, to a model without values, under `preload_module_classes`",
    "refused: load the weights, then attach",
)
@torch.no_grad()
def test_parts_without_values_are_refused(tmp_path: Path) -> None:
    from accelerate import cpu_offload, init_empty_weights

    model, before, method = _pair()
    with init_empty_weights(), pytest.raises(Refused, match="load the weights, then attach"):
        mmpeft.attach(model, method)
    close(_answer(model), _answer(before))
    with pytest.raises(Refused, match="load the weights, then attach"):
        mmpeft.attach(untouched(before).to("meta"), method)
    options = {"execution_device": torch.device("cpu"), "preload_module_classes": ["LlamaDecoderLayer"]}
    cpu_offload(model, **options)
    with pytest.raises(Refused, match="load the weights, then attach"):
        mmpeft.attach(model, method)
    close(_answer(model), _answer(before))
    mmpeft.attach(before, method)
    cpu_offload(before, **options)
    with pytest.raises(Refused, match="preload_module_classes"):
        _answer(before)


@row(
    "accelerate",
    "layers that are cast to few bits between passes (`LayerwiseCastingHook`, diffusers' too)",
    "refused: the parts under them would be cast too",
)
@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
def test_layerwise_casting(library: str) -> None:
    if library == "accelerate":
        from accelerate.big_modeling import attach_layerwise_casting_hooks as cast_layers
    else:
        from diffusers.hooks import apply_layerwise_casting as cast_layers

    types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    model, _, method = _pair()
    after = untouched(model)
    cast_layers(model, **types)
    with pytest.raises(Refused, match="few bits"):
        mmpeft.attach(model, method)
    if library == "accelerate":
        mmpeft.attach(after, method)
        with pytest.raises(Refused, match="few bits"):
            cast_layers(after, **types)


@row(
    "accelerate",
    "a second `attach`, `use`, `detach` of one of two after the hooks of a tuned model have gone again",
    "the tunings in use are in effect",
)
@torch.no_grad()
def test_tunings_change_after_hooks(tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model, before, method = _pair()
    tuning = bend(mmpeft.attach(model, method))
    expected = plain(tuning, before)
    _aligned(model, tmp_path)
    remove_hook_from_submodules(model)
    other = bend(mmpeft.attach(model, mmpeft.LoRA(rank=3, at="attn.*"), name="other"))
    close(_answer(model), _answer(plain(other, before)))
    mmpeft.use(model, "default")
    close(_answer(model), _answer(expected))
    _cpu(model, tmp_path)
    close(_answer(model), _answer(expected))
    with mmpeft.use(model, "other"):
        close(_answer(model), _answer(plain(other, before)))
    other.detach()
    close(_answer(model), _answer(expected))
