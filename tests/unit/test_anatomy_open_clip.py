"""open_clip: what `nn.MultiheadAttention` reads is adapted, q, k, v and out apart, and nothing else moves."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer
from torch import nn

import mmpeft
from mmpeft.sites import sites
from mmpeft.sites.selector import select
from tests.matrix.example import Example
from tests.matrix.families.open_clip import FAMILIES
from tests.support.moved import redraw

ALL = mmpeft.LoRA(rank=2, alpha=4, at="attn.*")


@pytest.fixture
def example() -> Example:
    return FAMILIES["open_clip"]()


def test_four_deltas_of_one_attention_and_base_keys(example: Example) -> None:
    model = example.model
    keys = set(model.state_dict())
    tuning = mmpeft.attach(model, ALL)
    own = [p for p in tuning.placements if p.home.startswith("visual.transformer.resblocks.0.")]
    assert [p.role for p in own] == ["attn.q", "attn.k", "attn.v", "attn.out"]
    assert keys <= set(model.state_dict())
    assert isinstance(model.visual.transformer.resblocks[0].attn, nn.MultiheadAttention)


def test_each_delta_changes_its_own_rows_and_merges_to_w_plus_delta(example: Example) -> None:
    model = example.model
    attention = model.visual.transformer.resblocks[0].attn
    before = attention.in_proj_weight.detach().clone(), attention.out_proj.weight.detach().clone()
    tuning = mmpeft.attach(model, ALL.where("image:attn.* & depth=0"))
    redraw(tuning.parameters(), seed=0)
    delta = {p.role: p.part.factor.materialise() * p.part.scale for p in tuning.placements}
    tuning.merge()
    inside = torch.cat([delta[f"attn.{name}"] for name in "qkv"])
    torch.testing.assert_close(attention.in_proj_weight, before[0] + inside, atol=1e-6, rtol=0)
    torch.testing.assert_close(attention.out_proj.weight, before[1] + delta["attn.out"], atol=1e-6, rtol=0)
    tuning.unmerge()
    tuning.detach()
    assert torch.equal(attention.in_proj_weight, before[0])


def test_every_delta_trains(example: Example) -> None:
    liveness = mmpeft.attach(example.model, ALL).liveness(example.batch).check()
    assert len(liveness.pulses) == 2 * 4 * 2 * 2  # towers, projections, blocks, factors


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_agrees_with_its_merged_self(batch_first: bool, masked: bool) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 16, 2, 4, 2.0, output_dim=8)
    for block in model.transformer.resblocks:
        block.attn.batch_first = batch_first
    tuning = mmpeft.attach(model, ALL)
    redraw(tuning.parameters(), seed=0)
    attention = model.transformer.resblocks[1].attn
    x = torch.randn(3, 5, 16)
    mask = torch.full((5, 5) if batch_first else (3, 3), float("-inf")).triu_(1) if masked else None
    tuned = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
    tuning.merge()
    merged = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(tuned, merged, atol=1e-6, rtol=1e-5)


def test_frozen_bf16_weights_keep_their_bits_for_a_thousand_steps() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 16, 1, 2, 2.0, output_dim=8).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuning = mmpeft.attach(model, ALL)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2, weight_decay=0.1)
    x = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    for _ in range(1000):
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.dtype == torch.float32 for p in tuning.parameters())


def test_open_clips_own_checkpointing_gives_the_same_gradients(example: Example) -> None:
    model = example.model
    tuning = mmpeft.attach(model, ALL)
    redraw(tuning.parameters(), seed=0)
    plain = torch.autograd.grad(example().square().sum(), list(tuning.parameters()))
    model.set_grad_checkpointing(True)
    model.train()
    again = torch.autograd.grad(example().square().sum(), list(tuning.parameters()))
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_intermediates_and_cast_dtype(example: Example) -> None:
    model = example.model
    tuning = mmpeft.attach(model, ALL + mmpeft.Full(at="mlp.up"))
    redraw(tuning.parameters(), seed=0)
    found = model.visual.forward_intermediates(example.batch["image"])
    tuning.merge()
    merged = model.visual.forward_intermediates(example.batch["image"])
    torch.testing.assert_close(found["image_features"], merged["image_features"], atol=1e-5, rtol=1e-5)
    assert model.visual.transformer.get_cast_dtype() == torch.float32
    assert model.to(torch.bfloat16).transformer.get_cast_dtype() == torch.bfloat16


def test_towers_apart(example: Example) -> None:
    available = sites(example.model)
    assert {s.tower for s in select(available, "image:attn.*")} == {"image"}
    tuning = mmpeft.attach(example.model, mmpeft.LoRA(rank=2, at="text:attn.{q,v}"))
    assert all(p.home.startswith("transformer.") for p in tuning.placements)


def test_clip_lora_counts_on_vit_b_16() -> None:
    """q, k and v of both towers of ViT-B/16, rank 2: 184,320 parameters (CLIP-LoRA, arXiv:2405.18541)."""
    with torch.device("meta"):
        model = CLIP(**open_clip.get_model_config("ViT-B-16"))
    method = mmpeft.LoRA(rank=2, at="attn.{q,k,v}")
    assert method.count(model, sites(model)) == 184_320
