"""Forwards patched on the instance, hooks, and weights that are made when they are read."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import mmpeft
from mmpeft.errors import MMPEFTError
from tests.compat.models import ALL, bend, causal, close, differ, images, plain, untouched, vit, words
from tests.compat.rows import row


def _method_type(layer: Any) -> None:
    def forward(self: Any, input: Tensor) -> Tensor:
        return type(self).forward(self, input) * 2

    layer.forward = types.MethodType(forward, layer)


def _partial(layer: Any) -> None:
    def forward(module: Any, old: Any, input: Tensor) -> Tensor:
        return old(input) + 1

    layer.forward = functools.partial(forward, layer, layer.forward)


def _closure(layer: Any) -> None:
    old = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs) * 0.5

    layer.forward = functools.wraps(old)(forward)


def _own_maths(layer: Any) -> None:
    """Never calls the old forward: reads the weight itself."""
    layer.forward = lambda input: torch.nn.functional.linear(input, layer.weight, layer.bias).tanh()


def _accelerate_like(layer: Any) -> None:
    """As accelerate does it: the old forward kept on the module, the new one a partial over a weak reference."""
    layer._old_forward = layer.forward
    ref = weakref.ref(layer)

    def forward(input: Tensor) -> Tensor:
        module = ref()
        assert module is not None
        return module._old_forward(input) - 0.5

    layer.forward = functools.update_wrapper(functools.partial(forward), layer._old_forward)


def _twice(layer: Any) -> None:
    _closure(layer)
    _partial(layer)


PATCHES: dict[str, Callable[[Any], None]] = {
    "MethodType": _method_type,
    "partial": _partial,
    "closure": _closure,
    "own maths": _own_maths,
    "old forward kept": _accelerate_like,
    "two": _twice,
}
WHERE: dict[str, Callable[[Any], Any]] = {
    "layer": lambda m: m.blocks[0].mlp.fc1,
    "fused layer": lambda m: m.blocks[1].attn.qkv,
    "block": lambda m: m.blocks[0],
    "root": lambda m: m,
}
METHODS: dict[str, Any] = {"LoRA": mmpeft.LoRA(rank=2, at=ALL)}


def _fits(patch: str, where: str) -> bool:
    return patch != "own maths" or "layer" in where


def _named(patch: str) -> Callable[[Any], None]:
    """A patch whose replacement takes `input` or `x`, whatever the module calls it."""
    return PATCHES[patch]


_cases = pytest.mark.parametrize(
    ("patch", "where"), [(p, w) for p in PATCHES for w in WHERE if _fits(p, w)], ids=lambda v: v.replace(" ", "-")
)


@row(
    "torch",
    "`module.forward` patched on the instance before `attach`: MethodType, partial, closure, own maths, nested",
    "the patched forward runs with the adapter in it, or attach refuses; the patch is left after detach",
)
@_cases
@torch.no_grad()
def test_patched_before_attach(patch: str, where: str) -> None:
    model = vit()
    before = untouched(model)
    _named(patch)(WHERE[where](model))
    right = untouched(before)
    _named(patch)(WHERE[where](right))
    base = right(images())
    close(model(images()), base)
    try:
        tuning = mmpeft.attach(model, METHODS["LoRA"])
    except MMPEFTError:
        close(model(images()), base)
        return
    close(model(images()), base)
    bend(tuning)
    expected = plain(tuning, before)
    _named(patch)(WHERE[where](expected))
    differ(model(images()), base)
    close(model(images()), expected(images()))
    with mmpeft.use(model, None):
        close(model(images()), base)
    tuning.detach()
    assert torch.equal(model(images()), base)


@row(
    "torch",
    "the same after `attach`, then `detach`",
    "the patch runs with the adapter in it, and without it after detach",
)
@_cases
@torch.no_grad()
def test_patched_after_attach(patch: str, where: str) -> None:
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, METHODS["LoRA"]))
    expected = plain(tuning, before)
    for one in (model, expected):
        _named(patch)(WHERE[where](one))
    differ(model(images()), before(images()))
    close(model(images()), expected(images()))
    try:
        tuning.detach()
    except MMPEFTError:
        close(model(images()), expected(images()))
        return
    right = untouched(before)
    _named(patch)(WHERE[where](right))
    close(model(images()), right(images()))


@row("torch", "a patch taken off again (`del module.forward`) after `attach`", "the adapter stays in effect")
@pytest.mark.parametrize("patch", [p for p in PATCHES if p != "own maths"])
@torch.no_grad()
def test_patches_taken_off(patch: str) -> None:
    model = vit()
    before = untouched(model)
    layer = model.blocks[0].mlp.fc1
    _named(patch)(layer)
    try:
        tuning = bend(mmpeft.attach(model, METHODS["LoRA"]))
    except MMPEFTError:
        return
    del layer.forward
    close(model(images()), plain(tuning, before)(images()))
    tuning.detach()
    close(model(images()), before(images()))


@row(
    "torch",
    "a module's old bound `forward`, kept by someone before `attach` and called afterwards",
    "the adapter is in effect, or the plain layer's answer where the caller holds the class's function itself",
)
@torch.no_grad()
def test_a_bound_forward_kept_elsewhere() -> None:
    model = vit()
    before = untouched(model)
    old = model.forward
    tuning = bend(mmpeft.attach(model, METHODS["LoRA"]))
    close(old(images()), plain(tuning, before)(images()))  # its layers are tuned, whoever calls the root


# -- hooks ------------------------------------------------------------------------------------------------------


def _hooks(layer: Any, seen: list[Any]) -> list[Any]:
    def pre(module: Any, args: Any, kwargs: Any) -> Any:
        seen.append(("pre", args[0].shape))
        return (args[0] * 1.5, *args[1:]), kwargs

    def post(module: Any, args: Any, output: Any) -> Any:
        seen.append(("post", type(output).__name__))
        return output + 0.1

    def back(module: Any, grad_in: Any, grad_out: Any) -> Any:
        seen.append(("backward", round(float(grad_out[0].sum()), 3)))

    return [
        layer.register_forward_pre_hook(pre, with_kwargs=True),
        layer.register_forward_hook(post),
        layer.register_full_backward_hook(back),
    ]


@row(
    "torch",
    "forward, pre- and full backward hooks on tuned layers, blocks and the root, before and after `attach`",
    "called as often and with what they get on the merged plain model",
)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks(where: str, order: str) -> None:
    model = vit()
    before = untouched(model)
    seen: list[Any] = []
    right: list[Any] = []
    if order == "before":
        handles = _hooks(WHERE[where](model), seen)
    tuning = bend(mmpeft.attach(model, METHODS["LoRA"]))
    if order == "after":
        handles = _hooks(WHERE[where](model), seen)
    expected = plain(tuning, before)
    _hooks(WHERE[where](expected), right)
    got, other = model(images().requires_grad_()), expected(images().requires_grad_())
    close(got, other)
    got.sum().backward()
    other.sum().backward()
    assert [kind for kind, _ in seen] == [kind for kind, _ in right]
    close([value for kind, value in seen if kind == "backward"], [v for k, v in right if k == "backward"], 1e-2)
    for handle in handles:
        handle.remove()
    close(model(images()), plain(tuning, before)(images()))


@row(
    "torch",
    "`register_module_forward_hook` for all modules (profilers, torchinfo)",
    "the base's modules are seen in the base's order",
)
def test_global_hooks() -> None:
    model = vit()
    before = untouched(model)
    mmpeft.attach(model, METHODS["LoRA"])
    orders = []
    for one in (before, model):
        names = {id(module): name for name, module in one.named_modules() if "mmpeft" not in name.split(".")}
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, names=names, seen=seen: seen.append(names.get(id(module), ""))
        )
        one(images())
        handle.remove()
        orders.append([name for name in seen if name])
    assert orders[1] == orders[0]


# -- weights made when they are read ------------------------------------------------------------------------------


class _Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def _parametrized(layer: Any) -> None:
    parametrize.register_parametrization(layer, "weight", _Scaled())


REPARAMETRIZED: dict[str, Callable[[Any], Any]] = {
    "parametrize": _parametrized,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@row(
    "torch",
    "`weight_norm`, `spectral_norm`, `orthogonal`, own parametrisations, `prune` on a tuned layer before `attach`",
    "the update is added to the weight that the layer makes, or attach refuses",
)
@pytest.mark.parametrize("kind", REPARAMETRIZED)
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "BitFit"])
@torch.no_grad()
def test_reparametrised_before_attach(kind: str, method: str) -> None:
    model = vit()
    layer = model.blocks[0].mlp.fc1
    REPARAMETRIZED[kind](layer)
    model.eval()
    base = model(images())
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    cls = type(layer)
    given = {"at": "mlp.up"} if method == "BitFit" else {"rank": 2, "at": "mlp.up"}
    try:
        tuning = mmpeft.attach(model, getattr(mmpeft, method)(**given))
    except MMPEFTError:
        assert torch.equal(model(images()), base)
        assert type(layer) is cls
        return
    close(model(images()), base)
    for placement in tuning.placements:
        if placement.home == "blocks.1.mlp.fc1":
            continue
        for parameter in placement.part.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 48)
    if method == "BitFit":
        bias = next(p for n, p in tuning.named_parameters() if "blocks.0" in n)
    else:
        part = next(p.part for p in tuning.placements if p.home == "blocks.0.mlp.fc1")
        weight = part.read(layer, "weight", weight)
    close(layer(x), torch.nn.functional.linear(x, weight, bias), 1e-4)
    tuning.detach()
    assert type(layer) is cls
    close(model(images()), base)


@row(
    "torch",
    "the same after `attach`, then `detach`",
    "the update stays in effect, or a clear error",
)
@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "spectral_norm", "old weight_norm", "prune"])
@torch.no_grad()
def test_reparametrised_after_attach(kind: str) -> None:
    model = vit()
    before = untouched(model)
    layer, own = model.blocks[0].mlp.fc1, before.blocks[0].mlp.fc1
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at="mlp.up")))
    torch.manual_seed(3)
    try:
        REPARAMETRIZED[kind](layer)
        model.eval()
        x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))
        got = layer(x)
    except (MMPEFTError, RuntimeError):
        return
    torch.manual_seed(3)
    REPARAMETRIZED[kind](own)
    before.eval()
    part = next(p.part for p in tuning.placements if p.home == "blocks.0.mlp.fc1")
    expected = torch.nn.functional.linear(x, part.read(own, "weight", own.weight), own.bias)
    close(got, expected, 1e-4)
    try:
        tuning.detach()
    except MMPEFTError:
        return
    close(model(images()), before(images()))
    assert type(layer).__name__ == type(own).__name__


@row(
    "torch",
    "a language model whose attention module is patched as quantisers and kernels do (Liger, Unsloth style)",
    "the patched forward of the class or the instance runs with tuned projections",
)
@pytest.mark.parametrize("where", ["instance", "class"])
@torch.no_grad()
def test_kernels_patched_in(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)))
    expected = plain(tuning, before)

    def swiglu(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x) * 1.25)

    if where == "class":
        monkeypatch.setattr(type(before.model.layers[0].mlp), "forward", swiglu)
    else:
        for one in (model, expected):
            for block in one.model.layers:
                block.mlp.forward = types.MethodType(swiglu, block.mlp)
    close(model(words()).logits, expected(words()).logits, 1e-4)
    differ(model(words()).logits, before(words()).logits)
