"""torch's own tools on a tuned model: functional calls, copies, files, types, averages, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import ConfigError, Refused
from tests.compat.models import ALL, bend, causal, close, differ, images, near, plain, tuned, untouched, vit, words
from tests.compat.rows import row


def _own(model: Any) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "mmpeft" in n.split(".")}


def _other(model: Any) -> dict[str, Tensor]:
    own = _own(model)
    return {n: p.detach() for n, p in model.named_parameters() if n not in own}


@row("torch", "`torch.func.functional_call` with other values of adapter and base")
def test_functional_call() -> None:
    model = vit()
    tuning, before, expected = tuned(model)
    close(functional_call(model, _own(model), (images(),)), expected(images()))
    zero = {name: torch.zeros_like(value) for name, value in _own(model).items()}
    close(functional_call(model, zero, (images(),)), before(images()))
    half = {name: value * 0.5 for name, value in _other(model).items()}
    right = untouched(before)
    with torch.no_grad():
        for parameter in right.parameters():
            parameter.mul_(0.5)
    close(functional_call(model, half, (images(),)), plain(tuning, right)(images()), 1e-4)
    close(functional_call(model, _own(model), (), {"x": images()}), expected(images()))
    close(model(images()), expected(images()))


@row("torch", "`nn.DataParallel`", "as an untouched copy on one device; refused on several, and before `attach`")
def test_data_parallel() -> None:
    model = vit()
    tuning, _, expected = tuned(model)
    devices, place = ([0], "cuda") if torch.cuda.is_available() else (None, "cpu")
    wrapped = nn.DataParallel(model.to(place), device_ids=devices)
    close(wrapped(images().to(place)).cpu(), expected(images()), 1e-4)
    with pytest.raises(Refused, match="use DistributedDataParallel, or a single device"):
        model._replicate_for_data_parallel()  # what a pass over several devices begins with
    with pytest.raises(ConfigError, match="wrapped in a DataParallel; attach to the model itself"):
        mmpeft.attach(wrapped, mmpeft.LoRA(), "other")
    tuning.detach()
    assert model._replicate_for_data_parallel() is not model


def _loss(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


@row("torch", "`torch.func.grad`, `vmap(grad)` for per-sample gradients", "autograd's gradients")
@pytest.mark.parametrize("rows", [3, 48])
def test_per_sample_gradients(rows: int) -> None:
    model = vit()
    tuning, _, _ = tuned(model)
    own, x = _own(model), images(rows)

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, values, (sample[None],)).square().mean()

    each = vmap(grad(loss), (None, 0))(own, x)
    whole = grad(lambda values: functional_call(model, values, (x,)).square().mean())(own)
    _loss(model, x).backward()
    prefix = {id(p): n for n, p in model.named_parameters()}
    for parameter in tuning.parameters():
        name = prefix[id(parameter)]
        close(whole[name], parameter.grad, 1e-5)
        close(each[name].mean(0), parameter.grad, 1e-5)
    model.zero_grad()
    _loss(model, x[1:2]).backward()
    for parameter in tuning.parameters():
        close(each[prefix[id(parameter)]][1], parameter.grad, 1e-5)


@row("torch", "`stack_module_state` and `vmap` over an ensemble of tuned models")
def test_an_ensemble() -> None:
    torch.manual_seed(0)
    model = vit()
    before = untouched(model)
    models, plains = [], []
    for std in (0.1, 0.3):
        one = untouched(before)
        tuning = bend(mmpeft.attach(one, mmpeft.LoRA(rank=2, at=ALL)), std)
        models.append(one)
        plains.append(plain(tuning, before))
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0])
    run = lambda p, b: functional_call(skeleton, (p, b), (images(),))  # noqa: E731
    got = vmap(run, randomness="same")(parameters, buffers)
    for one, right in zip(got, plains, strict=True):
        close(one, right(images()), 1e-4)


@row("torch", "second derivatives, `torch.func.jvp`, `hessian`-vector products", "those of the merged plain model")
def test_higher_derivatives() -> None:
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's fused attention knows no forward derivative
    _, _, expected = tuned(model)
    x, v = images(2), images(2, seed=4)
    got, right = (torch.func.jvp(lambda a, one=one: one(a), (x,), (v,)) for one in (model, expected))
    close(got[0], right[0])
    close(got[1], right[1], 1e-4)
    found = []
    for one in (model, expected):
        a = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(_loss(one, a), a, create_graph=True)
        found.append(torch.autograd.grad((first * v).sum(), a)[0])
    close(found[0], found[1], 1e-4)


@row("torch", "`deepcopy`, `pickle`, `torch.save` and `torch.load` of a tuned, trained, merged model")
def test_copies_and_files(tmp_path: Path) -> None:
    model = causal()
    tuning, before, expected = tuned(model)
    model(words(), labels=words()).loss.backward()
    torch.save(model, tmp_path / "whole.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(tmp_path / "whole.pt", weights_only=False))
    for one in copies:
        close(one(words()).logits, expected(words()).logits)
        own = mmpeft.tunings(one)["default"]
        assert own.method == tuning.method
        with mmpeft.use(one, None):
            close(one(words()).logits, before(words()).logits)
        own.merge()
        close(one(words()).logits, expected(words()).logits, 1e-4)
        own.unmerge()
        own.detach()
        close(one(words()).logits, before(words()).logits)
        assert type(one) is type(before)
    close(model(words()).logits, expected(words()).logits)


@row(
    "torch",
    "`state_dict` round trips: of the tuned model, of the base into it, by `torch.save(weights_only=True)`",
    "the base's keys keep their names",
)
def test_state_dicts() -> None:
    model = vit()
    _, before, expected = tuned(model)
    state = model.state_dict()
    assert [name for name in state if "mmpeft" not in name.split(".")] == list(before.state_dict())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = vit()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    mmpeft.attach(fresh, mmpeft.LoRA(rank=2, at=ALL))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    close(fresh(images()), expected(images()))
    found = model.load_state_dict(before.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("mmpeft" in name.split(".") for name in found.missing_keys)
    close(model(images()), expected(images()))
    fresh.load_state_dict(state, assign=True)
    close(fresh(images()), expected(images()))


@row("torch", "`half`, `bfloat16`, `double`, `to`, `float` on a tuned model")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_types(dtype: torch.dtype, method: str) -> None:
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, getattr(mmpeft, method)(rank=2, at=ALL)), 0.1)
    expected = plain(tuning, before)
    model.to(dtype)
    right = expected.to(dtype)(images().to(dtype))
    got = model(images().to(dtype))
    near(got, right, {torch.float64: 1e-5, torch.float16: 1e-2}.get(dtype, 0.05))
    model.float()
    assert model(images()).dtype == torch.float32


@row("torch", "`parameters_to_vector` and back, `clip_grad_norm_`, `zero_grad`, `requires_grad_`, `share_memory`")
def test_utilities() -> None:
    model = vit()
    tuning, before, expected = tuned(model)
    vector = nn.utils.parameters_to_vector(tuning.parameters()).detach()
    nn.utils.vector_to_parameters(torch.zeros_like(vector), tuning.parameters())
    close(model(images()), before(images()))
    nn.utils.vector_to_parameters(vector, tuning.parameters())
    close(model(images()), expected(images()))
    _loss(model, images()).backward()
    norm = torch.stack([p.grad.norm() for p in tuning.parameters()]).norm()
    close(nn.utils.clip_grad_norm_(model.parameters(), 1e-3), norm)
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    model.share_memory()
    close(model(images()), expected(images()))
    seen: list[str] = []
    model.apply(lambda module: seen.append(type(module).__name__))
    assert seen.count("Linear") == sum(isinstance(m, nn.Linear) for m in before.modules())


@row("torch", "`AveragedModel` (SWA and EMA) over a training run", "the average of the adapter's values")
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averages(kind: str) -> None:
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)), 0.1)
    given = {"multi_avg_fn": get_ema_multi_avg_fn(0.75)} if kind == "ema" else {}
    averaged = AveragedModel(model, **given)
    values = []
    for step in range(3):
        with torch.no_grad():
            for parameter in tuning.parameters():
                parameter.add_(0.05 * (step + 1))
        averaged.update_parameters(model)
        values.append({n: t.clone() for n, t in tuning.state_dict().items()})
    inner = mmpeft.tunings(averaged.module)["default"]
    for name, tensor in inner.state_dict().items():
        kept = values[0][name]
        for i, value in enumerate(values[1:], 2):
            kept = 0.75 * kept + 0.25 * value[name] if kind == "ema" else kept + (value[name] - kept) / i
        close(tensor, kept, 1e-5)
    close(averaged(images()), plain(inner, before)(images()))
    differ(averaged(images()), model(images()))


@row(
    "torch",
    "`torch.utils.checkpoint` in the user's code, both ways, with `use` switched before the backward pass",
    "the gradients without checkpointing",
)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recompute", [None, "block"])
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_checkpointing_by_the_user(reentrant: bool, recompute: Any, part: str) -> None:
    model = vit()
    one = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL), name="one"))
    two = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL), name="two"), 0.3)
    one.recompute = recompute
    x = images().requires_grad_()

    def run(kept: bool) -> Tensor:
        if not kept:
            return model(x).square().mean()
        if part == "model":
            return checkpoint(model, x, use_reentrant=reentrant).square().mean()
        model.set_grad_checkpointing(True)
        found = model(x).square().mean()
        model.set_grad_checkpointing(False)
        return found

    def gradients(kept: bool) -> list[Tensor]:
        for parameter in (*one.parameters(), *two.parameters()):
            parameter.grad = None
        with one.use():
            first = run(kept)
        with two.use():
            second = run(kept)
        with mmpeft.use(model, None):
            second.backward()
            first.backward()
        return [p.grad.clone() for p in (*one.parameters(), *two.parameters())]

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        close(got, expected)


@row(
    "transformers",
    "`gradient_checkpointing_enable` with `use` switched before the backward pass",
    "the gradients without checkpointing",
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_transformers(reentrant: bool) -> None:
    model = causal().train()
    one = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL), name="one"))
    bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL), name="two"), 0.3)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with one.use():
            loss = model(words(), labels=words()).loss
        loss.backward()
        return [p.grad.clone() for p in one.parameters()]

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for got, right in zip(gradients(), expected, strict=True):
        close(got, right)


@row("torch", "autocast, `inference_mode`, `no_grad`, anomaly detection, saved-tensor hooks, `retain_graph`")
def test_modes() -> None:
    model = vit()
    tuning, _, expected = tuned(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, right = model(images()), expected(images())
    near(got, right)
    with torch.inference_mode():
        got = model(images())
        assert got.is_inference()
    close(got.clone(), expected(images()))
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = _loss(model, images())
        loss.backward(retain_graph=True)
        loss.backward()
    twice = [p.grad.clone() for p in tuning.parameters()]
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        _loss(model, images()).backward()
    for parameter, other in zip(tuning.parameters(), twice, strict=True):
        close(2 * parameter.grad, other)


@row(
    "torch",
    "`train`, `eval`, `named_modules`, `get_submodule`, `children`, `repr`",
    "the base's modules under the base's names",
)
def test_module_tables() -> None:
    model = vit()
    before = untouched(model)
    mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL))
    names = [name for name, _ in model.named_modules() if "mmpeft" not in name.split(".")]
    assert names == [name for name, _ in before.named_modules()]
    base = [n for n, _ in model.named_parameters() if "mmpeft" not in n.split(".")]
    assert base == [n for n, _ in before.named_parameters()]
    model.train()
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    assert repr(model).startswith("VisionTransformer(")
