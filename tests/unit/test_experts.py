"""Mixtures of experts: their sites are exact, and an update or a vector for each expert does what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft import attach
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.llm.inputs import example_inputs
from mmpeft.methods import IA3, DoRA, Full, LoRA
from mmpeft.sites import Site, sites
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.liveness import liveness
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


def move(tuning: Attached) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


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
    move(tuning)
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
