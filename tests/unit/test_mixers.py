"""Sub-layers that mix positions without a softmax: where each product is, and that tuning it does what it says."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import Refused
from mmpeft.sites import Site, inputs_of, sites, structure
from tests.support.moved import perturb
from tests.zoo import hf
from tests.zoo.judge import judge

A, B = "model.layers.0", "backbone.layers.0.mixer"
SCAN = {"mixer.in": ["in_proj"], "conv": ["conv1d"], "mixer.out": ["out_proj"], "mixer": [""]}
MAMBA = {**SCAN, "proj": ["dt_proj", "x_proj"]}
HEADS = {"mixer.in": ["linear_x", "linear_y"], "mixer.out": ["linear_out"], "conv": ["conv_1d"], "mixer": [""]}
WKV = {"mixer.in": ["key", "receptance", "value"], "mixer.out": ["output"], "mixer": [""]}
QKVZ = "in_proj_qkvz"
DELTA = {
    "attn.q": [f"{QKVZ}[0:24:144]"],
    "attn.k": [f"{QKVZ}[24:48:144]"],
    "attn.v": [f"{QKVZ}[48:96:144]"],
    "attn.gate": [f"{QKVZ}[96:144:144]"],
    "attn.out": ["out_proj"],
    "conv": ["conv1d"],
    "proj": ["in_proj_ba"],
    "attn": [""],
    "kv": [""],
}
OWN = {"attn.q": ["q_proj"], "attn.k": ["k_proj"], "attn.v": ["v_proj"], "attn.out": ["o_proj"], "attn": [""]}
OLMO = {**OWN, "attn.gate": ["g_proj"], "conv": ["conv1d"], "proj": ["a_proj", "b_proj"], "kv": [""]}
GATES = [f"{name}_proj" for name in ("b", "forget_gate.f_a", "forget_gate.f_b", "g_a")]
KIMI = {**OWN, "attn.gate": ["g_b_proj"], "conv": ["conv1d"], "proj": GATES, "kv": [""]}

EXPECTED: dict[str, tuple[str, dict[str, list[str]]]] = {
    "mamba": (B, MAMBA),
    "falcon_mamba": (B, MAMBA),
    "jamba": (f"{A}.mamba", MAMBA),
    "mamba2": (B, SCAN),
    "bamba": (f"{A}.mamba", SCAN),
    "falcon_h1": (f"{A}.mamba", SCAN),
    "granitemoehybrid": (f"{A}.mamba", SCAN),
    "nemotron_h": (f"{A}.mixer", SCAN),
    "zamba": (f"{A}.mamba", {**SCAN, "proj": ["", ""]}),
    "zamba2": (f"{A}.mamba", SCAN),
    "recurrent_gemma": (f"{A}.temporal_block", {**HEADS, "proj": ["rg_lru", "rg_lru"]}),
    "rwkv": ("rwkv.blocks.0.attention", WKV),
    "qwen3_next": (f"{A}.linear_attn", DELTA),
    "olmo_hybrid": (f"{A}.linear_attn", OLMO),
}
"""Of the first block of each type, the module that mixes and the paths in it by role, from reading the code."""


def by_role(found: list[Site], path: str) -> dict[str, list[str]]:
    """Paths of the sites in a module, below it, with their rows."""
    table: dict[str, list[str]] = {}
    for site in found:
        if f"{site.path}.".startswith(f"{path}.") and site.role not in ("norm", "block", "tokens", "param"):
            rows = f"[{':'.join(map(str, site.rows))}]" if site.rows else ""
            table.setdefault(site.role, []).append(site.path[len(path) + 1 :] + rows)
    return {role: sorted(paths) for role, paths in table.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_of_a_type(name: str) -> None:
    path, expected = EXPECTED[name]
    assert by_role(structure(hf.build(name)), path) == expected


def test_rwkv_channels_are_a_feed_forward_network() -> None:
    found = by_role(structure(hf.build("rwkv")), "rwkv.blocks.0.feed_forward")
    assert found == {"mlp.up": ["key"], "mlp.gate": ["receptance"], "mlp.down": ["value"], "mlp": [""]}


def test_a_network_between_attention_and_mixer_keeps_its_roles() -> None:
    """Zamba's shared transformer has no residual sums: its result goes into the mixer behind it."""
    found = by_role(structure(hf.build("zamba")), "model.layers.1")
    assert found["mlp.up"] == ["shared_transf.feed_forward.up_proj"]
    assert found["mlp.gate"] == ["shared_transf.feed_forward.gate_proj"]
    assert found["mlp.down"] == ["shared_transf.feed_forward.down_proj"]
    assert found["mixer.in"] == ["mamba_decoder.mamba.in_proj"]
    assert found["mixer"] == ["mamba_decoder.mamba"]
    assert found["attn"] == ["linear"]


def test_step_size_is_read_from_the_left() -> None:
    """`dt_proj.weight @ x`: all rows, stored as a linear stores them, with its bias."""
    site = next(s for s in structure(hf.build("mamba")) if s.path == f"{B}.dt_proj")
    assert (site.rows, site.transposed, site.via, site.bias) == (None, False, "weight", f"{B}.dt_proj.bias")


@pytest.mark.parametrize("name", ["mamba", "mamba2", "recurrent_gemma", "rwkv", "qwen3_next"])
def test_recurrent_parameters_are_named_tensors(name: str) -> None:
    own = {
        "mamba": "A_log D",
        "mamba2": "A_log D dt_bias",
        "rwkv": "time_decay time_first",
        "qwen3_next": "A_log dt_bias",
    }
    path = EXPECTED[name][0]
    tensors = {s.path: s.depth for s in sites(hf.build(name)) if s.role == "param"}
    for tensor in own.get(name, "rg_lru.recurrent_param").split():
        assert tensors[f"{path}.{tensor}"] == 0


TIMM: dict[str, tuple[str, str, dict[str, Any], dict[str, list[str]]]] = {
    "coat": (
        "coat_tiny",
        "serial_blocks1.0.factoratt_crpe",
        {"embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1), "parallel_depth": 1, "img_size": 64},
        {"attn.q": ["qkv[0:16]"], "attn.k": ["qkv[16:32]"], "attn.v": ["qkv[32:48]"], "attn.out": ["proj"]},
    ),
    "xcit": (
        "xcit_nano_12_p8_224",
        "blocks.0.attn",
        {"depth": 1, "embed_dim": 32, "img_size": 32},
        {"attn.q": ["qkv[0:32]"], "attn.k": ["qkv[32:64]"], "attn.v": ["qkv[64:96]"], "attn.out": ["proj"]},
    ),
    "efficientvit": (
        "efficientvit_b0",
        "stages.3.blocks.1.context_module.main",
        {},
        {
            "attn.q": ["qkv.conv[0:16:48]"],
            "attn.k": ["qkv.conv[16:32:48]"],
            "attn.v": ["qkv.conv[32:48:48]"],
            "attn.out": ["proj.conv"],
            "conv": ["aggreg.0.0", "aggreg.0.1"],
        },
    ),
    "mambaout": (
        "test_mambaout",
        "stages.0.blocks.0",
        {},
        {"mixer.in": ["fc1"], "conv": ["conv"], "mixer.out": ["fc2"], "mixer": ["fc2"]},
    ),
    "poolformer": ("poolformerv2_s12", "stages.0.blocks.0.token_mixer", {}, {"mixer": [""]}),
    "gmlp": (
        "gmlp_ti16_224",
        "blocks.0.mlp_channels",
        {"img_size": 32},
        {"mixer.in": ["fc1"], "proj": ["gate.proj"], "mixer.out": ["fc2"], "mixer": [""]},
    ),
    "convnext": (
        "test_convnext",
        "stages.0.blocks.0",
        {},
        {"conv": ["conv_dw"], "mlp.up": ["mlp.fc1"], "mlp.down": ["mlp.fc2"], "mlp": ["mlp"]},
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_roles_of_a_picture_model(name: str) -> None:
    variant, path, sizes, expected = TIMM[name]
    model = timm.create_model(variant, **sizes)
    found = by_role(structure(model, torch.zeros(2, 3, sizes.get("img_size", 96), sizes.get("img_size", 96))), path)
    if "attn.q" in expected:
        expected = {**expected, "attn": [""], "kv": [""]}
    assert found == expected


@pytest.mark.parametrize("name", ["coat", "xcit"])
def test_learned_keys_are_refused_where_positions_are_summed_over(name: str) -> None:
    variant, path, sizes, _ = TIMM[name]
    model = timm.create_model(variant, **sizes)
    size = sizes["img_size"]
    kv = next(s for s in structure(model, torch.zeros(2, 3, size, size)) if s.role == "kv" and s.path == path)
    assert ("no softmax" if name == "coat" else "attends to channels") in kv.refuse


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba", "qwen3_next", "rwkv", "recurrent_gemma"])
def test_every_product_learns_merges_and_is_loaded(name: str) -> None:
    row = judge("transformers", name, ("LoRA", "AdaptFormer", "Houlsby"))
    assert not row["error"], row["error"]
    assert {method: state["state"] for method, state in row["methods"].items()} == dict.fromkeys(row["methods"], "ok")
    assert "merged" not in row["methods"]["LoRA"]


def test_a_module_that_runs_for_several_streams_has_no_tap() -> None:
    """CoaT's parallel blocks run one network for each scale: no module says which run a branch is beside."""
    variant, _, sizes, _ = TIMM["coat"]
    model = timm.create_model(variant, **sizes).eval()
    picture = torch.randn(2, 3, 64, 64)
    shared = next(s for s in structure(model, picture) if s.role == "mlp" and s.path == "parallel_blocks.0.mlp2")
    assert (shared.stream, shared.out) == ("", "")
    before = model(picture)
    with pytest.raises(Refused, match="use ParallelAdapter"):
        mmpeft.attach(model, mmpeft.AdaptFormer(bottleneck=4), example=picture)
    tuning = mmpeft.attach(model, mmpeft.ParallelAdapter(), example=picture)
    perturb(tuning)
    assert not torch.allclose(model(picture), before)


def test_a_fused_scan_is_given_tuned_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training a kernel multiplies by weights that it is handed: they are those with the update."""
    model = hf.build("mamba").train()
    home: Any = sys.modules[type(model).__module__]
    seen: list[tuple[Tensor, ...]] = []

    def kernel(
        xz: Tensor, conv: Tensor, bias: Tensor, x_proj: Tensor, dt: Tensor, out: Tensor, *_: Any, **__: Any
    ) -> None:
        seen.append((x_proj, dt, out))

    monkeypatch.setattr(home, "mamba_inner_fn", kernel)
    mixer: Any = model.get_submodule(B)
    plain = [w.detach().clone() for w in (mixer.x_proj.weight, mixer.dt_proj.weight, mixer.out_proj.weight)]
    tuning = mmpeft.attach(model, mmpeft.LoRA(at="kind=linear & depth>=0", rank=2))
    perturb(tuning)
    inputs = inputs_of(model)
    assert inputs is not None
    model(*inputs[0], **{**inputs[1], "use_cache": False})
    assert all(not torch.allclose(own, before) for own, before in zip(seen[0], plain))
    assert all(own.requires_grad for own in seen[0])


def test_the_watch_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.hub_kernels as hub

    answers: list[bool] = []
    model = hf.build("mamba2")
    home: Any = sys.modules[type(model).__module__]
    own = home.mamba2_chunk_scan

    def scan(*args: Any, **kwargs: Any) -> Any:
        answers.append(hub.is_torchdynamo_exporting())
        return own(*args, **kwargs)

    monkeypatch.setattr(home, "mamba2_chunk_scan", scan)
    model.marked = "watched anew"
    structure(model)
    assert answers
    assert all(answers)
    assert not hub.is_torchdynamo_exporting()


def test_rescaled_weights_are_refused_by_the_setting() -> None:
    """RWKV divides two weights of its deeper blocks in evaluation, unless it is told not to."""
    model: Any = hf.build("rwkv")
    assert not any("rescale_every" in s.refuse for s in structure(model))
    model.config.rescale_every = 2
    refused = {s.path for s in structure(model) if "rescale_every=0" in s.refuse}
    names = ("attention.output", "feed_forward.value")
    assert refused == {f"rwkv.blocks.{i}.{name}" for i in (2, 3) for name in names}


# -- products from the left, by hand -------------------------------------------------------------------------------


class Left(nn.Module):
    """`weight @ x`, with a bias along the same channels."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6))
        self.down = nn.Linear(6, 4)
        self.einsum = einsum

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.einsum("oi,bli->bol", self.up, x) if self.einsum else self.up @ x.mT
        return x + self.down((turned + self.bias[:, None]).relu().mT)


@pytest.mark.parametrize("einsum", [False, True])
def test_a_product_from_the_left(einsum: bool) -> None:
    model, x = nn.Sequential(Left(einsum), Left(einsum)), torch.randn(2, 5, 4)
    site = next(s for s in structure(model, x) if s.path == "0" and s.kind == "linear")
    assert (site.role, site.tensor, site.rows, site.transposed, site.bias) == ("mlp.up", "up", None, False, "0.bias")
    tuning = mmpeft.attach(model, mmpeft.LoRA(at="mlp.up", rank=2), example=x)
    perturb(tuning)
    tuned = model(x)
    tuning.merge()
    torch.testing.assert_close(model(x), tuned)
