"""Prefixes on language models: what transformers' own cache would hold, in training and in generation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import mmpeft
from tests.matrix.families.transformers import FAMILIES, GQA

P = 3


def _llama(implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GQA, attn_implementation=implementation)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def _cached(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, tuning: mmpeft.Tuning) -> torch.Tensor:
    """Transformers' own way: the same keys and values as a cache, the text at its own positions."""
    cache = DynamicCache(config=model.config)
    with mmpeft.use(model, None):
        for i, placement in enumerate(tuning.placements):
            keys, values = placement.part.keys_and_values().transpose(1, 2).unsqueeze(1)
            cache.update(keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1), i)
        positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
        whole = torch.cat([torch.ones(len(ids), P, dtype=mask.dtype), mask], dim=1)
        return model(ids, attention_mask=whole, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_prefix_is_what_a_cache_would_hold(padding: str, implementation: str) -> None:
    model = _llama(implementation)
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    ids = torch.randint(3, 60, (2, 7))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, :2] = 0
        mask = mask if padding == "left" else mask.flip(1)
    tuned = model(ids, attention_mask=mask, position_ids=torch.arange(7)[None].expand(2, -1)).logits
    real = mask.bool()
    torch.testing.assert_close(tuned[real], _cached(model, ids, mask, tuning)[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_a_cache(beams: int) -> None:
    model = _llama()
    mmpeft.attach(model, mmpeft.PrefixTuning(tokens=P, hidden=16))
    ids = torch.randint(3, 60, (2, 5))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "attention_mask": mask, "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    with mmpeft.use(model, None):
        assert not torch.equal(with_cache, model.generate(ids, use_cache=True, **options))


def test_baking_drops_the_mlp_and_changes_nothing(tmp_path) -> None:
    example = FAMILIES["t5"]()
    tuning = mmpeft.attach(example.model, mmpeft.PrefixTuning(tokens=P, hidden=16))
    before, size = example.answer(), tuning.report().trainable
    tuning.for_inference()
    assert torch.equal(example.answer(), before)
    assert tuning.report().trainable < size
    assert not any("mlp" in name for name, _ in tuning.named_parameters())
    tuning.save(tmp_path)
    other = FAMILIES["t5"]()
    loaded = mmpeft.load(other.model, tmp_path)
    assert loaded.method == mmpeft.PrefixTuning(tokens=P, hidden=0)
    assert torch.equal(other.answer(), before)


def test_a_closed_gate_is_the_plain_model_and_opens() -> None:
    model = _llama()
    ids = torch.randint(3, 60, (2, 5))
    plain = model(ids).logits
    tuning = mmpeft.attach(model, mmpeft.LLaMAAdapter(tokens=P, layers=1))
    assert [p.home for p in tuning.placements] == ["model.layers.1.self_attn"]
    assert torch.equal(model(ids).logits, plain)
    with torch.no_grad():
        tuning.placements[0].part.gate.fill_(1.0)
    assert not torch.allclose(model(ids).logits, plain, atol=1e-3)


def test_the_models_own_config_is_left_alone() -> None:
    model = _llama("eager")
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    assert model.config._attn_implementation == "eager"
    tuning.detach()
    assert model.model.layers[0].self_attn.config is model.config
