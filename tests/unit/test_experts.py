"""Mixtures of experts: their sites are exact, and an update or a vector for each expert does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmpeft
from mmpeft import attach
from mmpeft.errors import Refused
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.llm.inputs import example_inputs
from mmpeft.methods import IA3, AdaLoRA, DoRA, Full, KronA, LoHa, LoRA
from mmpeft.sites import Site, sites
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.liveness import liveness
from tests.support.moved import perturb
from tests.zoo.hf import build

TYPES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text")
WAYS = ("eager", "batched_mm", "grouped_mm")
METHODS = {
    "each": LoRA(at="expert.*", rank=3),
    "shared": LoRA(at="expert.*", rank=3, experts="shared"),
    "dora": DoRA(at="expert.*", rank=3),
    "dora shared": DoRA(at="expert.*", rank=3, experts="shared"),
    "ia3": IA3(at="expert.*"),
    "whole": Full(at="param & path=*experts*"),
}


def mixture(model_type: str, way: str = "eager") -> nn.Module:
    """A small model with weights of a size that makes its experts count."""
    model = build(model_type)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = way
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run(model: nn.Module) -> Tensor:
    args, kwargs = example_inputs(model)
    out: Tensor = model(*args, **kwargs).logits
    return out


def kinds(model: nn.Module) -> list[Site]:
    return [s for s in sites(model) if s.kind == "experts" or s.role == "router" or s.role.startswith("expert.")]


@pytest.mark.parametrize("model_type", TYPES)
def test_every_way_of_computing_gives_the_same_sites(model_type: str) -> None:
    found = [kinds(mixture(model_type, way)) for way in WAYS]
    assert found[0] == found[1] == found[2]
    roles = [site.role for site in found[0]]
    assert roles.count("expert.up") == roles.count("expert.gate") == roles.count("expert.down") == roles.count("router")
    assert roles.count("expert.up") >= 2
    assert all(site.via == "weight" and site.depth >= 0 for site in found[0] if site.kind == "experts")


def test_rows_are_found_without_gradients_too() -> None:
    model = build("mixtral")
    model.register_buffer("of_another_make", torch.zeros(3))  # so that no earlier watch serves it
    with torch.no_grad():
        found = sites(model)
    assert {"attn.q", "attn.k", "attn.v", "expert.up", "expert.gate", "expert.down"} <= {site.role for site in found}


@pytest.mark.parametrize(
    ("model_type", "rows", "transposed"),
    [
        ("mixtral", {"expert.gate": "first", "expert.up": "second"}, False),
        ("qwen3_moe", {"expert.gate": "first", "expert.up": "second"}, False),
        ("deepseek_v3", {"expert.gate": "first", "expert.up": "second"}, False),
        ("llama4_text", {"expert.gate": "first", "expert.up": "second"}, True),
        ("gpt_oss", {"expert.gate": (0, 1, 2), "expert.up": (1, 2, 2)}, True),
    ],
)
def test_rows_are_those_of_the_modules_own_code(model_type: str, rows: dict[str, Any], transposed: bool) -> None:
    model = mixture(model_type)
    for site in kinds(model):
        if site.kind != "experts":
            continue
        weight = model.get_parameter(f"{site.path}.{site.tensor}")
        total = weight.shape[2 if transposed else 1]
        half = {"first": (0, total // 2), "second": (total // 2, total)}
        expected = rows.get(site.role)
        assert site.rows == half.get(expected, expected) if isinstance(expected, str) else site.rows == expected
        assert site.transposed == transposed
        assert site.tensor == ("down_proj" if site.role == "expert.down" else "gate_up_proj")


@pytest.mark.parametrize("model_type", TYPES)
def test_experts_are_linear_in_the_up_rows_alone(model_type: str) -> None:
    model = mixture(model_type)
    up, gate = (next(s for s in kinds(model) if s.role == f"expert.{name}") for name in ("up", "gate"))
    stack = model.get_parameter(f"{up.path}.{up.tensor}").detach()
    inner = F.linear(torch.randn(5, stack.shape[1 if up.transposed else 2]), stack[0].mT if up.transposed else stack[0])

    def network(site: Site, factor: float) -> Tensor:
        scaled = put_rows(inner, take_rows(inner, site.rows, -1) * factor, site.rows, -1)
        module = model.get_submodule(up.path)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(scaled)  # type: ignore[operator, no-any-return]
        one, other = scaled.chunk(2, -1)
        return other * module.act_fn(one)  # type: ignore[operator, no-any-return]

    def bend(site: Site) -> float:
        return float((network(site, 0.02) - 2 * network(site, 0.01) + network(site, 0.0)).abs().max())

    assert bend(up) < 1e-6 < 1e-5 < bend(gate)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("name", METHODS)
def test_parts_on_experts(model_type: str, way: str, name: str) -> None:
    model, plain, method = mixture(model_type, way), mixture(model_type), METHODS[name]
    base = run(model).detach()
    tuning = attach(model, method)
    assert torch.equal(run(model), base)
    assert liveness(tuning, example_inputs(model)[1]).check().ok
    assert sum(p.numel() for p in tuning.parameters()) == method.count(model, sites(model))
    perturb(tuning, by=0.1)
    tuned = run(model)
    assert (tuned - base).abs().max() > 0.1
    found = torch.autograd.grad(tuned.square().mean(), list(tuning.parameters()))
    expected = formed(plain, tuning)
    assert torch.allclose(tuned, expected, atol=2e-4)
    for own, other in zip(found, torch.autograd.grad(expected.square().mean(), list(tuning.parameters()))):
        assert torch.allclose(own, other, atol=1e-3 * float(other.abs().max()) + 1e-7)
    with torch.no_grad():
        tuning.merge()
        assert torch.allclose(run(model), tuned, atol=2e-4)
        tuning.unmerge()
        assert torch.allclose(run(model), tuned, atol=2e-4)
    tuning.detach()
    assert torch.equal(run(model), base)


def formed(plain: nn.Module, tuning: Attached) -> Tensor:
    """What the plain model gives with whole weights that each part's own `read` has formed."""
    weights: dict[str, Tensor] = {}
    for placement in tuning.placements:
        for hook in placement.hooks:
            name, host = f"{hook.path}.{hook.name}", plain.get_submodule(hook.path)
            base = weights.get(name, plain.get_parameter(name))
            weights[name] = placement.part.read(host, hook.name, base)
    args, kwargs = example_inputs(plain)
    out: Tensor = torch.func.functional_call(plain, weights, args, kwargs).logits
    return out


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Words go to the best of a list of experts, and all through one that is shared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.choose = nn.Linear(width, 6)
        self.members = nn.ModuleList(Expert(width, 24) for _ in range(6))
        self.common = Expert(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        best, index = self.choose(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, member in enumerate(self.members):
            words = (index == number).nonzero().flatten()
            if len(words):
                out.index_add_(0, words, member(flat[words]) * best[words, None])
        return self.common(x) + out.view_as(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixed = nn.LayerNorm(width), Mixed(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(self.norm(x))  # type: ignore[no-any-return]


class Own(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def test_a_list_of_experts_of_which_some_rest() -> None:
    model = Own().eval()
    with torch.no_grad():
        model.blocks[0].mixed.choose.bias[3] = -100.0  # type: ignore[union-attr,index]
    x = torch.randn(2, 9, 32)
    found = sites(model, x)
    own = {(s.path, s.role) for s in found if s.kind == "linear"}
    for block in range(2):
        at = f"blocks.{block}.mixed"
        assert (f"{at}.choose", "router") in own
        assert {(f"{at}.common.first", "mlp.up"), (f"{at}.common.last", "mlp.down")} <= own
        for number in range(6):
            assert {
                (f"{at}.members.{number}.first", "expert.up"),
                (f"{at}.members.{number}.last", "expert.down"),
            } <= own
    assert [s.path for s in found if s.role == "mlp"] == ["blocks.0.mixed", "blocks.1.mixed"]
    base = model(x)
    tuning = attach(model, LoRA(at="expert.*", rank=2), example=x)
    assert torch.equal(model(x), base)
    dead = liveness(tuning, x).dead
    assert dead
    assert all(".members." in name for name in dead)
    assert any("blocks.0.mixed.members.3." in name for name in dead)
    assert not any("choose" in name for name in dead)


@pytest.mark.parametrize("name", ["each", "shared", "dora", "ia3"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = mixture("gpt_oss", "grouped_mm")
    tuning = attach(model, METHODS[name])
    perturb(tuning, by=0.1)
    expected = run(model).detach()
    tuning.save(tmp_path / "adapter")
    again = mixture("gpt_oss", "eager")
    mmpeft.load(again, tmp_path / "adapter")
    assert torch.allclose(run(again), expected, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_several_tunings_at_once(way: str) -> None:
    model, base = mixture("mixtral", way), run(mixture("mixtral")).detach()
    one = attach(model, LoRA(at="expert.*", rank=2), "one")
    two = attach(model, LoRA(at="expert.{gate,down}", rank=3), "two")
    perturb(one, by=0.1)
    perturb(two, by=0.1)
    with torch.no_grad():
        with mmpeft.use(model, "one"):
            first = run(model)
        with mmpeft.use(model, "two"):
            second = run(model)
        with mmpeft.use(model, mmpeft.Together(("one", "two"))):
            both = run(model)
        with mmpeft.use(model, mmpeft.Together(("one", "two"), (1.0, 0.0))):
            alone = run(model)
        with mmpeft.use(model, None):
            assert torch.allclose(run(model), base, atol=1e-4)
    with pytest.raises(Refused, match="unit"), mmpeft.use(model, mmpeft.Together(("one", "two"), unit=("one",))):
        run(model)
    assert min(float((a - b).abs().max()) for a, b in ((first, second), (first, both), (second, both))) > 0.1
    assert torch.allclose(alone, first, atol=1e-4)
    if way == "batched_mm":  # which keeps the words of a row together
        with torch.no_grad(), mmpeft.use(model, ["one", "two"]):
            assert torch.allclose(run(model), torch.cat([first[:1], second[1:]]), atol=1e-4)
    else:
        with pytest.raises(Refused, match="do not stay apart"), mmpeft.use(model, ["one", "two"]):
            run(model)


def test_of_one_expert_no_more_than_its_own_weight_is_formed() -> None:
    model = mixture("mixtral")
    site = next(s for s in kinds(model) if s.role == "expert.down")
    tuning = attach(model, DoRA(at="expert.*", rank=2))
    perturb(tuning, by=0.1)
    host, sizes = model.get_submodule(site.path), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = isinstance(out, Tensor) and out._base is None and not func.is_view
            sizes.append(out.numel() if made else 0)
            return out

    with torch.no_grad(), Sizes():
        F.linear(torch.randn(3, host.down_proj.shape[2]), host.down_proj[1])
    assert max(sizes) <= host.down_proj[1].numel()


@pytest.mark.parametrize(
    ("way", "dtype"), [*((way, torch.bfloat16) for way in WAYS), *((way, torch.float64) for way in WAYS[:2])]
)
def test_other_types(way: str, dtype: torch.dtype) -> None:
    model = mixture("mixtral", way).to(dtype)
    base = run(model).detach()
    tuning = attach(model, LoRA(at="expert.*", rank=3))
    assert torch.equal(run(model), base)
    perturb(tuning, by=0.1)
    tuned = run(model)
    assert tuned.dtype == dtype
    tuned.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuning.parameters())


def test_compiled() -> None:
    model = mixture("mixtral", "batched_mm")
    tuning = attach(model, DoRA(at="expert.*", rank=3))
    perturb(tuning, by=0.1)
    expected = run(model)
    found = torch.compile(model, backend="aot_eager")(**example_inputs(model)[1]).logits
    assert torch.allclose(found, expected, atol=1e-4)
    own, other = (torch.autograd.grad(y.square().mean(), list(tuning.parameters())) for y in (expected, found))
    assert all(torch.allclose(a, b, atol=1e-3 * float(a.abs().max())) for a, b in zip(own, other))


@pytest.mark.parametrize("way", WAYS)
def test_dropout_is_of_what_enters_the_update(way: str) -> None:
    model = mixture("mixtral", way)
    tuning = attach(model, LoRA(at="expert.*", rank=3, dropout=0.5))
    perturb(tuning, by=0.1)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.allclose(run(model), run(model), atol=1e-3)


@pytest.mark.parametrize("method", [AdaLoRA(at="expert.up"), LoHa(at="expert.up"), KronA(at="expert.up")])
def test_methods_without_stacks_say_so(method: Any) -> None:
    with pytest.raises(Refused, match="kind 'experts'"):
        attach(mixture("mixtral"), method)
