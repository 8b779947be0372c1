"""What the anatomies say of timm's modules, checked by running the models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, StdConv2d, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from torch import Tensor, nn

import mmpeft
from mmpeft.sites import ROLES, Site, structure
from tests.matrix.example import Example
from tests.matrix.families.timm import FAMILIES, _build
from tests.support.shares import of_today

VIT = partial(_build, VisionTransformer, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
EVA = partial(_build, Eva, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
ROTARY: dict[str, Any] = {"use_rot_pos_emb": True}
CONVNEXT = partial(_build, ConvNeXt, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), ls_init_value=0.5)


def biased_apart() -> Example:
    """EVA whose attention calls qkv and adds the bias to its output in place."""
    example: Example = EVA(**ROTARY)
    for block in example.model.blocks:  # type: ignore[union-attr]
        block.attn.qkv_bias_separate = True
    return example


VARIANTS: dict[str, Callable[[], Example]] = {
    "vit_swiglu": partial(VIT, mlp_layer=SwiGLUPacked, init_values=0.5),
    "vit_glu_gate_last": partial(VIT, mlp_layer=GluMlp),
    "vit_inner_norms": partial(VIT, scale_attn_norm=True, scale_mlp_norm=True),
    "vit_prr": partial(VIT, global_pool="prr"),
    "vit_things": partial(VIT, block_fn=ParallelThingsBlock, init_values=0.5),
    "vit_parallel_fused": partial(VIT, block_fn=partial(ParallelScalingBlock, fuse_out_proj=True), qkv_bias=False),
    "vit_parallel_diff": partial(VIT, block_fn=DiffParallelScalingBlock),
    "vit_diff": partial(VIT, attn_layer="diff"),
    "deit_distilled": partial(
        _build, VisionTransformerDistilled, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "eva_postnorm": partial(EVA, use_post_norm=True, **ROTARY),
    "eva_mixed_rope": partial(EVA, rope_type="mixed", init_values=0.5, **ROTARY),
    "eva_packed": partial(EVA, swiglu_mlp=True, **ROTARY),
    "eva_biased_apart": biased_apart,
    "eva_grouped_kv": partial(EVA, attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True, **ROTARY),
    "eva_rope_attention": partial(EVA, attn_type="rope", attn_only_layer_scale=True, init_values=0.5, **ROTARY),
    "pe_core": partial(
        EVA, attn_type="rope", use_pre_transformer_norm=True, global_pool="map", attn_pool_num_heads=2, **ROTARY
    ),
    "beit_shared_bias": partial(
        _build, Beit, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, init_values=0.5,
        swiglu_mlp=True, scale_mlp=True, use_shared_rel_pos_bias=True, use_rel_pos_bias=False,
    ),
    "beit_absolute": partial(
        _build, Beit, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, qkv_bias=False,
        use_abs_pos_emb=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=False,
    ),
    "convnext_v2_conv": partial(CONVNEXT, conv_mlp=True, use_grn=True, stem_type="overlap", ls_init_value=None),
    "convnext_head_mlp": partial(CONVNEXT, head_hidden_size=16),
}  # fmt: skip
ALL = {**FAMILIES, **VARIANTS}
families = pytest.mark.parametrize("family", ALL)

SHAPED = {"linear", "conv", "norm"}
ROPE = ("eva02", "dinov3", "rope_vit", "pe_core", "eva_postnorm", "eva_mixed", "eva_packed", "eva_grouped", "eva_rope")


def sites_of(model: nn.Module) -> list[Site]:
    return structure(model)


def projections(sites: Iterable[Site]) -> list[Site]:
    """Sites that are a linear or a convolution."""
    return [s for s in sites if s.kind in ("linear", "conv")]


class Record:
    """Inputs and outputs of every call of every module in one forward pass."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.calls: dict[str, list[tuple[Tensor | None, Any]]] = defaultdict(list)

        def hook(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            # a copy: EVA with a separate bias changes the output of qkv in place
            first = inputs[0].detach().clone() if inputs else None
            self.calls[path].append((first, y.detach().clone() if isinstance(y, Tensor) else y))

        handles = [
            m.register_forward_hook(partial(hook, path), with_kwargs=True) for path, m in model.named_modules() if path
        ]
        with torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()

    def input(self, path: str) -> Tensor:
        ((x, _),) = self.calls[path]
        assert x is not None
        return x

    def output(self, path: str) -> Tensor:
        ((_, y),) = self.calls[path]
        assert isinstance(y, Tensor)
        return y


def check_structure(model: nn.Module) -> list[Site]:
    """What holds without running the model; also for a model on the meta device."""
    sites = sites_of(model)
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert len({(s.path, s.role, s.rows) for s in sites}) == len(sites), "a site is named twice"
    for site in sites:
        assert site.path in modules, site
        assert site.role in ROLES, site
        assert site.tower == "image", site
        for other in (site.stream, site.out, site.prefix_reader):
            assert not other or other in modules, (site, other)
        assert not site.bias or site.bias in tensors, (site, site.bias)

    # blocks: numbered from 0 without gaps; everything inside has the block's depth, everything outside -1
    blocks = [s for s in sites if s.role == "block"]
    assert [s.depth for s in blocks] == list(range(len(blocks)))
    assert blocks
    for site in sites:
        inside = [b.depth for b in blocks if f"{site.path}.".startswith(f"{b.path}.")]
        assert site.depth == (inside[0] if inside else -1), site
    assert [s.role for s in sites].count("tokens") == len(blocks)
    (stack,) = (s for s in sites if s.role == "stack")
    assert all(b.path.startswith(f"{stack.path}.") for b in blocks)

    # every linear and convolution is one site, or several that tile its rows without overlap
    fused: dict[str, list[Site]] = defaultdict(list)
    for site in projections(sites):
        fused[site.path].append(site)
    linears = {path for path, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(fused) == linears, "linears without a site, or sites that are no linear"
    for path, parts in fused.items():
        module = modules[path]
        assert {s.kind for s in parts} == {"conv" if isinstance(module, nn.Conv2d) else "linear"}, path
        if len(parts) == 1 and parts[0].rows is None:
            continue
        rows = sorted(s.rows for s in parts if s.rows)
        assert len(rows) == len(parts), path
        ends = [0, *(stop for _, stop in rows)]
        assert [start for start, _ in rows] == ends[:-1], path
        assert ends[-1] == len(module.weight), path  # type: ignore[arg-type]
        if any(s.role.startswith("attn.") for s in parts):
            order = [s.role for s in sorted(parts, key=lambda s: s.rows or (0, 0))]
            assert [r for r in order if r.startswith("attn.")] == ["attn.q", "attn.k", "attn.v"], path

    # every affine norm is a site; nothing else is
    norms = {s.path for s in sites if s.kind == "norm"}
    affine = {
        path
        for path, m in modules.items()
        if "norm" in type(m).__name__.lower() and m._parameters.get("weight") is not None
    }
    assert norms == {path for path in affine if not path.endswith(".grn")}

    heads = {s.path for s in sites if s.role == "head"}
    assert heads, "a model with classes has a head"
    return sites


@families
def test_structure(family: str) -> None:
    model, _, _ = ALL[family]()
    check_structure(model)


@families
def test_calls(family: str) -> None:
    """`call` modules run exactly once a pass; `weight` modules are not called, and their tensors matter."""
    model, x, _ = ALL[family]()
    sites, record = sites_of(model), Record(model, x)
    for site in sites:
        if site.kind not in SHAPED:
            continue
        expected = 1 if site.via == "call" or family == "eva_biased_apart" else 0
        assert len(record.calls[site.path]) == expected, f"{site}: called {len(record.calls[site.path])} times"
        assert site.via == "call" or site.bias, site
    y = model(x)
    (y * torch.randn(y.shape)).sum().backward()
    for site in projections(sites):
        weight = model.get_submodule(site.path).weight
        rows = weight.grad[slice(*site.rows)] if site.rows else weight.grad  # type: ignore[index]
        assert rows.abs().max() > 0, f"{site}: its rows do not reach the output"


@families
def test_declared_bias_belongs_to_its_rows(family: str) -> None:
    """Moving all that an attention reads by c is the same as moving the bias of each row slice by W c."""
    model, x, _ = ALL[family]()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    biased = [s for s in sites_of(model) if s.bias]
    assert {s.bias for s in biased} == {n for n in tensors if n.endswith(("q_bias", "k_bias", "v_bias", "mlp_bias"))}
    record = Record(model, x)
    for path in {s.path for s in biased if s.path.endswith(".qkv")}:
        attention, weight = model.get_submodule(path.removesuffix(".qkv")), model.get_submodule(path).weight
        h, c = record.input(path.removesuffix(".qkv")), torch.randn(weight.shape[1])  # type: ignore[index, arg-type]
        with torch.no_grad():
            plain, moved = attention(h), attention(h + c)
            for site in (s for s in biased if s.path == path):
                tensors[site.bias].add_((weight @ c)[slice(*site.rows)])  # type: ignore[misc, operator]
            assert not torch.allclose(moved, plain, atol=1e-3)
            torch.testing.assert_close(attention(h), moved, atol=1e-5, rtol=1e-4)


def test_bias_of_a_parallel_block_belongs_to_its_feed_forward_rows() -> None:
    model, x, _ = ALL["vit_parallel_fused"]()
    site = next(s for s in sites_of(model) if s.bias)
    assert site.role == "mlp.up"
    assert site.rows is not None
    before, delta = model(x), torch.randn(site.rows[1])
    model.get_parameter(site.bias).data += delta
    projection = model.get_submodule(site.path)
    padded = torch.cat([delta, torch.zeros(len(projection.weight) - len(delta))])  # type: ignore[arg-type]
    assert not torch.allclose(model(x), before, atol=1e-3)
    projection.register_forward_hook(lambda module, args, y: y - padded)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)


@families
def test_widths_and_channels(family: str) -> None:
    model, x, _ = ALL[family]()
    record = Record(model, x)
    for site in sites_of(model):
        if site.width and site.role not in ("tokens", "kv"):
            assert record.output(site.path).shape[site.channel_dim] == site.width, site
        if site.role in ("attn", "mlp"):
            assert site.width, site
            assert record.output(site.out or site.path).shape[site.channel_dim] == site.width, site
            if site.stream:
                assert record.input(site.stream).shape[site.channel_dim] == site.width, site


@families
def test_residual(family: str) -> None:
    """A block's output is its input plus the outputs of its sub-layers' `out`; `stream` modules read the sum so far."""
    model, x, _ = ALL[family]()
    record, sites = Record(model, x), sites_of(model)
    for block in (s for s in sites if s.role == "block"):
        start, end = record.input(block.path), record.output(block.path)
        own = [s for s in sites if s.role in ("attn", "mlp") and s.path.startswith(f"{block.path}.")]
        if not own:
            assert family.startswith("vit_parallel")
            continue
        stream = start
        for role in ("attn", "mlp"):
            subs = [s for s in own if s.role == role]
            for sub in subs:
                if sub.stream:
                    torch.testing.assert_close(record.input(sub.stream).reshape(end.shape), stream, msg=f"{sub}")
                else:
                    reads = record.input(sub.path)
                    assert reads.shape != stream.shape or not torch.allclose(reads, stream), f"{sub} reads the stream"
            if all(s.out for s in subs):
                stream = stream + sum(record.output(s.out).reshape(end.shape) for s in subs)
        if all(s.out for s in own):
            torch.testing.assert_close(stream, end, atol=1e-6, rtol=1e-5)
        else:
            assert family.startswith("convnext"), "a sub-layer whose path to the residual is not one module"
        for sub in own:
            assert record.output(sub.out or sub.path).abs().max() > 1e-3, f"{sub} adds nothing: the test is vacuous"


@families
def test_tokens(family: str) -> None:
    """`prefix` tokens precede the patches of every block; a module that counts them itself is named."""
    model, x, _ = ALL[family]()
    record = Record(model, x)
    for site in (s for s in sites_of(model) if s.role == "tokens"):
        if site.refuse:
            assert family.startswith(("beit", "swin", "convnext")), site
            continue
        assert record.input(site.path).shape[1:] == (site.prefix + model.patch_embed.num_patches, site.width)  # type: ignore[union-attr, operator]
        counters = [n for n, m in model.get_submodule(site.path).named_modules() if hasattr(m, "num_prefix_tokens")]
        rotary = getattr(model, "rope", None) is not None
        assert [f"{site.path}.{n}" for n in counters if rotary] == ([site.prefix_reader] if rotary else [])
        assert bool(site.prefix_reader) == rotary
        if rotary:
            assert model.get_submodule(site.prefix_reader).num_prefix_tokens == site.prefix


@pytest.mark.parametrize("family", [f for f in ALL if not f.startswith(("swin", "convnext"))])
def test_a_block_takes_one_more_token_or_refuses(family: str) -> None:
    """The refusals of prompts are true: there a block breaks on one more token; elsewhere it runs."""
    model, x, _ = ALL[family]()
    (site, *_) = (s for s in sites_of(model) if s.role == "tokens")

    def insert(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h = args[0]
        return (torch.cat([h[:, : site.prefix], h[:, -1:], h[:, site.prefix :]], 1), *args[1:])

    model.get_submodule(site.path).register_forward_pre_hook(insert)
    if site.refuse:
        with pytest.raises(RuntimeError):
            model(x)
        return
    for path in [s.prefix_reader for s in sites_of(model) if s.prefix_reader]:
        model.get_submodule(path).num_prefix_tokens += 1
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("family", [f for f in ALL if f.startswith(ROPE)])
def test_raised_prefix_keeps_the_rotation_of_the_patches(family: str) -> None:
    """With a token inserted after the prefix that nobody looks at, the others come out of attention as before."""
    model, _, _ = ALL[family]()
    site = next(s for s in sites_of(model) if s.role == "tokens")
    attention: Any = model.get_submodule(site.prefix_reader)
    h = torch.randn(2, site.prefix + model.patch_embed.num_patches, site.width)  # type: ignore[operator, union-attr]
    rope: Any = model.rope.get_embed()  # type: ignore[union-attr, operator]
    rope = rope[0] if getattr(model, "rope_mixed", False) else rope
    prompt = torch.randn(2, 1, site.width)
    longer = torch.cat([h[:, : site.prefix], prompt, h[:, site.prefix :]], 1)
    with torch.no_grad():
        plain = attention(h, rope=rope)
        attention.num_prefix_tokens += 1
        mask = torch.zeros(longer.shape[1], longer.shape[1])
        mask[:, site.prefix] = float("-inf")  # nobody looks at the prompt
        prompted = attention(longer, rope=rope, attn_mask=mask)
    kept = torch.cat([prompted[:, : site.prefix], prompted[:, site.prefix + 1 :]], 1)
    torch.testing.assert_close(kept, plain, atol=1e-6, rtol=1e-5)


def test_gate_and_up_of_fused_feed_forward() -> None:
    """The rows called `mlp.gate` are what the activation is applied to."""
    for family in ("vit_swiglu", "vit_glu_gate_last", "eva_packed"):
        model, _, _ = ALL[family]()
        sites = sites_of(model)
        up, gate = (next(s for s in sites if s.role == role) for role in ("mlp.up", "mlp.gate"))
        mlp: Any = model.get_submodule(up.path.removesuffix(".fc1"))
        seen: list[Tensor] = []
        mlp.act.register_forward_hook(lambda module, args, y, seen=seen: seen.append(args[0]))
        h = torch.randn(3, mlp.fc1.in_features)
        mlp(h)
        assert gate.rows is not None
        torch.testing.assert_close(seen[0], mlp.fc1(h)[:, slice(*gate.rows)], msg=family)


@pytest.mark.parametrize("family", ALL)
def test_sites_are_the_same_in_a_tuned_model(family: str) -> None:
    """A second tuning sees what the first one saw, although classes have been swapped."""
    model, _, _ = ALL[family]()
    before = sites_of(model)
    tunings = [mmpeft.LoRA(rank=2, at="mlp.*"), mmpeft.SSF()]
    if all(s.stream for s in before if s.role == "mlp") and any(s.role == "mlp" for s in before):
        tunings.append(mmpeft.AdaptFormer(bottleneck=2))
    if not any(s.refuse for s in before if s.role == "tokens"):
        tunings.append(mmpeft.VPT(tokens=2, deep=True))
    for i, method in enumerate(tunings):
        mmpeft.attach(model, method, f"t{i}").recompute = "block"
    assert sites_of(model) == before


def test_standardised_convolutions_are_tuned_by_their_weight() -> None:
    """A hybrid's stem standardises its weights; its group norms keep channels in front."""
    model = timm.create_model("vit_small_r26_s32_224", num_classes=3)
    sites = structure(model)
    standard = {p for p, m in model.named_modules() if isinstance(m, StdConv2d) or type(m).__name__ == "StdConv2dSame"}
    assert standard
    assert {s.path for s in sites if s.via == "weight"} == standard
    norms = {s.path: s.channel_dim for s in sites if s.kind == "norm"}
    assert norms["patch_embed.backbone.stem.norm"] == 1
    assert norms["blocks.0.norm1"] == -1
    tuned = mmpeft.attach(model, mmpeft.LoRA(rank=2, at=lambda s: s.path in standard and s.kind == "conv"))
    assert standard == {p.home for p in tuned.placements}


NAMED = {
    "vit_base_patch16_224": (12, 1, ""),
    "deit3_small_patch16_224": (12, 1, ""),
    "deit_tiny_distilled_patch16_224": (12, 2, ""),
    "vit_base_patch16_siglip_224": (12, 0, ""),
    "vit_base_patch16_clip_224": (12, 1, ""),
    "vit_small_patch14_reg4_dinov2": (12, 5, ""),
    "vit_small_patch16_dinov3": (12, 5, "attn"),
    "vit_medium_patch16_rope_reg1_gap_256": (12, 1, "attn"),
    "vit_pe_core_tiny_patch16_384": (12, 1, "attn"),
    "eva_giant_patch14_224": (40, 1, ""),
    "eva02_tiny_patch14_224": (12, 1, "attn"),
    "eva02_base_patch14_224": (12, 1, "attn"),
    "beit_base_patch16_224": (12, None, ""),
    "swin_tiny_patch4_window7_224": (12, None, ""),
    "swinv2_tiny_window8_256": (12, None, ""),
    "convnext_tiny": (18, None, ""),
    "convnextv2_tiny": (18, None, ""),
}
"""timm name -> blocks, prefix tokens (None: prompts refused), which module counts them."""

DIRECT = {"eva02_tiny_patch14_224", "eva_giant_patch14_224", "beit_base_patch16_224", "swinv2_tiny_window8_256"}
DIRECT |= {"vit_medium_patch16_rope_reg1_gap_256"}


@pytest.mark.parametrize("name", of_today(list(NAMED), lambda name: (name in DIRECT,)))
def test_named_models(name: str) -> None:
    """Models of full size, on the meta device: their structure, without their weight."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    sites = check_structure(model)
    blocks, prefix, reader = NAMED[name]
    tokens = [s for s in sites if s.role == "tokens"]
    assert len(tokens) == blocks
    assert all(bool(s.refuse) == (prefix is None) for s in tokens)
    if prefix is not None:
        assert {s.prefix for s in tokens} == {prefix}
    assert {s.prefix_reader for s in tokens} == ({f"blocks.{i}.{reader}" for i in range(blocks)} if reader else {""})
    assert ({s.role for s in sites if s.via == "weight"} == {"attn.q", "attn.k", "attn.v"}) == (name in DIRECT)
    assert not any(s.via == "weight" for s in sites) or name in DIRECT
