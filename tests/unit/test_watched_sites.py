"""Sites are found by watching: the former families keep theirs, and a model of one's own needs no anatomy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft
import mmpeft.sites.known as finding
from mmpeft.errors import AdapterFileError, SiteError
from mmpeft.sites import Site, sites, structure
from mmpeft.sites.watch import watch
from tests.matrix.example import Example
from tests.matrix.families import LIBRARIES
from tests.unit import test_anatomy_diffusers, test_anatomy_timm, test_anatomy_transformers

FORMER: dict[str, list[str]] = json.loads(Path(__file__).with_name("former_sites.json").read_text())
"""What the anatomies said that were written by hand, before sites were watched."""

ADDED = {
    "open_clip": {"proj@ tower=text", "proj@visual tower=image"},
    "coca": {"proj@text tower=text", "proj@visual tower=image", "proj@text_decoder tower=decoder"},
}
"""Projections into the shared space, which are bare tensors: the written anatomies left them out."""

CHANGED = {
    "vit_diff": " width=",  # of a refused site: half a head enters each of the two softmaxes
    "vit_parallel_diff": " width=",
    "hf_clip": " tower=lm",  # the projections of a pair of towers are of neither
}

APART = ("path", "role", "connect", "refuse", "below")
"""What is written in another way, or was not said: whether a tower is below others."""


@cache
def builders() -> dict[str, Callable[[], Example]]:
    own = (test_anatomy_timm.ALL, LIBRARIES["open_clip"], test_anatomy_diffusers.ALL, test_anatomy_transformers.ALL)
    return {name: build for family in own for name, build in family.items()}


def line(site: Site) -> str:
    """A site as the former ones are written down."""
    known: dict[str, Any] = {
        field.name: getattr(site, field.name)
        for field in dataclasses.fields(site)
        if field.name not in APART and getattr(site, field.name) != field.default
    }
    if site.refuse:
        known["refused"] = True
    if site.rows:
        known["rows"] = list(site.rows)
    return " ".join([f"{site.role}@{site.path}", *(f"{key}={value}".replace(" ", "") for key, value in known.items())])


@pytest.mark.parametrize("family", sorted(FORMER))
def test_former_families_keep_their_sites(family: str) -> None:
    """By the inputs that the library is known to take; what a family has in addition is named above."""
    found = [line(site) for site in structure(builders()[family]().model)]
    extra = [text for text in found if text not in FORMER[family]]
    missing = [text for text in FORMER[family] if text not in found]
    unexpected = [text for text in extra if not text.startswith(tuple(ADDED.get(family, ())) or "-")]
    if family in CHANGED:
        mark = CHANGED[family]
        assert all(mark in text for text in missing), missing
        assert [text.split(" ")[0] for text in missing] == [text.split(" ")[0] for text in unexpected]
    else:
        assert (missing, unexpected) == ([], [])


# -- a model of one's own ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Fused projections, one head, a gated network; nothing in it has a name that the suite knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.first = nn.Linear(width, 3 * width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, 6 * width)
        self.fourth = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = self.first(self.a(x)).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.second(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        up, gate = self.third(self.b(x)).chunk(2, dim=-1)
        return x + self.fourth(up * F.silu(gate))


class Own(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inlet = nn.Linear(5, width)
        self.steps = nn.ModuleList(Layer(width) for _ in range(3))
        self.outlet = nn.Linear(width, 2)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.inlet(x)
        for step in self.steps:
            x = step(x)
        result: Tensor = self.outlet(x.mean(1))
        return result


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Own:
    monkeypatch.setattr(finding, "_FOUND", type(finding._FOUND)())
    torch.manual_seed(0)
    return Own()


def test_own_model_needs_no_anatomy(own: Own) -> None:
    found = {(s.path, s.role): s for s in structure(own, torch.rand(2, 4, 5))}
    roles = {role for _, role in found}
    assert {"attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.gate", "mlp.down", "attn", "mlp"} <= roles
    assert found["steps.1.first", "attn.v"].rows == (0, 8)
    assert found["steps.1.first", "attn.q"].rows == (8, 16)
    assert found["steps.1.first", "attn.k"].rows == (16, 24)
    assert found["steps.1.third", "mlp.up"].rows == (0, 24)
    assert found["steps.1.third", "mlp.gate"].rows == (24, 48)
    assert [s.depth for s in found.values() if s.role == "block"] == [0, 1, 2]
    assert found["inlet", "embed"].depth == -1
    assert found["outlet", "head"].kind == "linear"


def test_watch_leaves_the_model_as_it_is(own: Own) -> None:
    own.train()
    before = {name: value for name, value in vars(own).items() if not name.startswith("_")}
    bits = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    record = watch(own, (torch.rand(2, 4, 5),), {})
    assert not record.real
    assert {name: value for name, value in vars(own).items() if not name.startswith("_")} == before
    assert all(torch.equal(tensor, bits[name]) for name, tensor in own.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())


def test_every_method_attaches_and_loads_without_an_example(own: Own, tmp_path: Path) -> None:
    """The second model is never watched: the adapter says where its parts stand."""
    batch = torch.rand(2, 4, 5)
    method = mmpeft.LoRA(at="attn.{q,v}|mlp.*") + mmpeft.PTuningV2(tokens=2) + mmpeft.Houlsby() + mmpeft.BitFit()
    tuning = mmpeft.attach(own, method, example=batch, train_head=True)
    tuning.liveness(batch).check()
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tuning.save(tmp_path)
    expected = own(batch)
    finding._FOUND.clear()
    torch.manual_seed(0)
    fresh = Own()
    mmpeft.load(fresh, tmp_path)
    assert torch.equal(fresh(batch), expected)


def test_without_example_the_error_says_what_to_give(own: Own) -> None:
    with pytest.raises(SiteError, match=r"inputs of .*Own.*attach\(model, method, example=batch\)"):
        mmpeft.attach(own, mmpeft.LoRA())
    assert not hasattr(own, "mmpeft")


def test_example_that_does_not_fit_shows_the_models_own_error(own: Own) -> None:
    with pytest.raises(SiteError, match=r"Own does not run on the example.*RuntimeError"):
        mmpeft.attach(own, mmpeft.LoRA(), example=torch.rand(2, 4, 7))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_sites_are_the_same_in_any_context(own: Own, context: Callable[[], Any]) -> None:
    batch = torch.rand(2, 4, 5)
    with context():
        found = structure(own, batch)
    finding._FOUND.clear()
    finding._LAST.clear()
    assert found == structure(own, batch)


def test_a_model_that_counts_its_passes_is_the_same_model(own: Own) -> None:
    first = structure(own, torch.rand(2, 4, 5))
    own(torch.rand(2, 4, 5))
    assert structure(own) == first


def test_adapter_with_a_site_of_another_kind_is_refused(own: Own, tmp_path: Path) -> None:
    tuning = mmpeft.attach(own, mmpeft.LoRA(), example=torch.rand(2, 4, 5))
    tuning.save(tmp_path)
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    manifest["anatomy"][0]["depth"] = "deep"
    (tmp_path / "adapter.json").write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError, match="depth of a site is int, got 'deep'"):
        mmpeft.load(Own(), tmp_path)


@pytest.mark.parametrize("method", [mmpeft.LoRA(at="mlp.*"), mmpeft.Houlsby(), mmpeft.IA3(at="mlp.down")])
def test_layers_that_torch_fuses_run_their_parts(method: mmpeft.methods.base.Method) -> None:
    """In evaluation `nn.TransformerEncoderLayer` reads the weights past its modules; detached it does so again."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    batch = torch.rand(2, 5, 16)
    plain = model(batch)
    tuning = mmpeft.attach(model, method, example=batch)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.5)
        assert not torch.allclose(model(batch), plain, atol=1e-3)
    tuning.detach()
    assert model.layers[0].activation_relu_or_gelu == 1
    assert torch.equal(model(batch), plain)


class Branching(Own):
    """Its control flow depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_control_flow_on_data_is_watched_on_a_real_batch(own: Own) -> None:
    model = Branching()
    batch = torch.rand(2, 4, 5)
    assert watch(model, (batch,), {}).real
    assert [line(s) for s in structure(model, batch)] == [line(s) for s in structure(own, batch)]
    assert model.seen == 0


def test_tensors_of_a_watch_stay_in_no_cache() -> None:
    """A function of the model's code that keeps what it gave would hand fake tensors to the next real pass."""
    model = timm.create_model("eva02_tiny_patch14_224", depth=2)
    batch = torch.rand(1, 3, 224, 224)
    sites(model)
    assert torch.isfinite(model.eval()(batch)).all()


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """What keeps one result, inside a plain function."""
    kept = lru_cache(maxsize=1)(function)

    def call(*args: Any) -> Any:
        return kept(*args)

    return call


@_keeping
def _ramp(length: int) -> Tensor:
    return torch.arange(length) / length


class Ramped(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + _ramp(x.shape[-1]))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("first", [False, True])
def test_tensors_of_a_watch_stay_in_no_wrapped_cache(first: bool) -> None:
    """Whether the cache, which holds one result, was filled before the watch or by it."""
    model, batch = Ramped(), torch.rand(2, 4, 5)
    if first:
        _ramp(7)
    sites(model, batch)
    assert type(model(batch)) is Tensor
