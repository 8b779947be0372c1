"""Prefixes on transformers' attentions of every kind: under each implementation, and written out by the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip.modeling_blip_text import BlipTextModel

import mmpeft
from mmpeft.errors import Refused, SiteError
from tests.matrix.families.transformers import GQA, LM, T5, TOKENS, VIT, WORDS

P = 3
TEXT = {**LM, "max_position_embeddings": 64}
LONG = {**GQA, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "clip_text": lambda impl: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT, attn_implementation=impl)),
    "owlvit_text": lambda impl: hf.OwlViTTextModel(hf.OwlViTTextConfig(**TEXT, attn_implementation=impl)),
    "siglip_text": lambda impl: hf.SiglipTextModel(hf.SiglipTextConfig(**TEXT, attn_implementation=impl)),
    "bert": lambda impl: hf.BertModel(hf.BertConfig(**TEXT, attn_implementation=impl)),
    "bert_decoder": lambda impl: hf.BertModel(hf.BertConfig(**TEXT, is_decoder=True, attn_implementation=impl)),
    "gpt2": lambda impl: hf.GPT2Model(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS, bos_token_id=1, attn_implementation=impl)
    ),
    "llama": lambda impl: hf.LlamaModel(hf.LlamaConfig(**GQA, attn_implementation=impl)),
    "gemma3": lambda impl: hf.Gemma3TextModel(hf.Gemma3TextConfig(**LONG, attn_implementation=impl)),
    "t5": lambda impl: hf.T5EncoderModel(hf.T5Config(**T5, attn_implementation=impl)),
}


def _by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **options: Any) -> Any:
    """`softmax(q [K_p; K]ᵀ + [0; bias]) [V_p; V]`, written out on the prefix that a plain copy carries."""
    keys, values = module.prefix.transpose(1, 2).unsqueeze(1).expand(-1, len(q), -1, -1, -1)  # type: ignore[operator]
    k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, dim=1).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    for bias in (options.get("position_bias"), mask):
        if bias is not None:
            scores = scores + F.pad(bias.expand(*bias.shape[:-1], k.shape[2] - P), (P, 0))
    return (scores.softmax(-1) @ v.repeat_interleave(groups, dim=1)).transpose(1, 2), None


def _plain_with_prefix(model: nn.Module, tuning: mmpeft.Tuning, plain: nn.Module) -> nn.Module:
    ALL_ATTENTION_FUNCTIONS.register("by_hand", _by_hand)
    ALL_MASK_ATTENTION_FUNCTIONS.register("by_hand", eager_mask)
    for module in plain.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "by_hand"
    for placement in tuning.placements:
        plain.get_submodule(placement.home).prefix = placement.part.keys_and_values()  # type: ignore[union-attr]
    return plain


def _strong(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval()


def _masks() -> dict[str, Tensor | None]:
    left = torch.ones(2, TOKENS, dtype=torch.long)
    left[0, :2] = 0
    return {"none": None, "left": left, "right": left.flip(1)}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", REGISTRY)
@torch.no_grad()
def test_every_implementation_is_the_softmax_by_hand(family: str, implementation: str, padding: str) -> None:
    torch.manual_seed(0)
    model = _strong(REGISTRY[family](implementation))
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    plain = _plain_with_prefix(model, tuning, plain)
    ids, mask = torch.randint(3, WORDS, (2, TOKENS)), _masks()[padding]
    real = torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    ours, theirs = (m(input_ids=ids, attention_mask=mask).last_hidden_state[real] for m in (model, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block masks are lengthened; uncompiled here, for compiling takes a minute."""

    import torch.nn.attention.flex_attention as flex
    import transformers.integrations.flex_attention as hf_flex
    import transformers.masking_utils as masking

    def plain_flex(q: Tensor, k: Tensor, v: Tensor, training: bool = False, **options: Any) -> Any:
        return flex.flex_attention(q, k, v, **options)

    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", plain_flex)
    made = masking.create_block_mask
    monkeypatch.setattr(masking, "create_block_mask", lambda **options: made(**{**options, "_compile": False}))
    ids = torch.randint(3, WORDS, (2, TOKENS))
    for family in ("llama", "clip_text", "gemma3"):
        torch.manual_seed(0)
        model = _strong(REGISTRY[family]("flex_attention"))
        plain = copy.deepcopy(model)
        tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
        plain = _plain_with_prefix(model, tuning, plain)
        for mask in _masks().values():
            real = torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask.bool()
            ours, theirs = (m(input_ids=ids, attention_mask=mask).last_hidden_state[real] for m in (model, plain))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert_decoder"])
@torch.no_grad()
def test_with_a_cache(family: str, static: bool) -> None:
    """In two passes, the first of several words: as without a cache, also where the cache is longer than the text."""
    torch.manual_seed(0)
    model = _strong(REGISTRY[family]("sdpa"))
    mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    ids = torch.randint(3, WORDS, (2, TOKENS))
    whole = model(input_ids=ids).last_hidden_state
    cache = hf.StaticCache(model.config, max_cache_len=16) if static else hf.DynamicCache(config=model.config)
    passes = [model(input_ids=part, cache=cache, use_cache=True).last_hidden_state for part in ids.split((3, 1, 2), 1)]
    torch.testing.assert_close(torch.cat(passes, dim=1), whole, atol=1e-5, rtol=1e-4)


# -- attentions that the model writes out --------------------------------------------------------------------

WRITTEN: dict[str, Callable[[], nn.Module]] = {
    "rembert": lambda: hf.RemBertModel(hf.RemBertConfig(**TEXT)),
    "rembert_decoder": lambda: hf.RemBertModel(hf.RemBertConfig(**TEXT, is_decoder=True)),
    "megatron": lambda: hf.MegatronBertModel(hf.MegatronBertConfig(**TEXT)),
    "bigbird": lambda: hf.BigBirdModel(hf.BigBirdConfig(**TEXT, attention_type="original_full")),
    "convbert": lambda: hf.ConvBertModel(hf.ConvBertConfig(**TEXT, embedding_size=32)),
    "roformer": lambda: hf.RoFormerModel(hf.RoFormerConfig(**TEXT)),
    "tapas": lambda: hf.TapasModel(hf.TapasConfig(**TEXT)),
    "blip_text": lambda: BlipTextModel(hf.BlipTextConfig(**TEXT, encoder_hidden_size=32)),
}


def _longer(x: Tensor, extra: Tensor) -> Tensor:
    return torch.cat([extra.expand(len(x), *extra.shape[1:]), x], dim=1)


def _padded(value: Any) -> Any:
    """A mask of scores with room in front for more keys, and as many queries."""
    if not isinstance(value, Tensor) or value.shape[-1] != TOKENS:
        return value
    return F.pad(value, (P, 0, P, 0) if value.shape[-2] == TOKENS else (P, 0))


@pytest.mark.parametrize("family", WRITTEN)
@torch.no_grad()
def test_written_out_is_the_module_on_more_tokens(family: str) -> None:
    """Keys and values projected from more states: what the untouched module makes of these in front of the text."""
    torch.manual_seed(0)
    model = _strong(WRITTEN[family]())
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    placement = next(p for p in tuning.placements if p.home.endswith("layer.1.attention.self"))
    home = placement.home
    ours, theirs = model.get_submodule(home), plain.get_submodule(home)
    extra = torch.randn(1, P, 32)
    heads, size = placement.part.heads, placement.part.width
    made = torch.stack([layer(extra)[0].view(P, heads, size) for layer in (theirs.key, theirs.value)])
    placement.part.tokens.copy_(made)
    if family == "convbert":  # its other half sees neighbours, which the extra states would be
        for module in (ours, theirs):
            module.conv_out_layer.weight.zero_()
            module.conv_out_layer.bias.zero_()
    seen: list[Any] = []
    handle = ours.register_forward_hook(lambda m, a, k, y: seen.append((a, k, y)), with_kwargs=True)
    mask = _masks()["left"]
    model(input_ids=torch.randint(3, WORDS, (2, TOKENS)), attention_mask=mask)
    handle.remove()
    (states, *more), kwargs, y = seen[0]
    given = {n: _padded(v) for n, v in kwargs.items() if n != "cache"}
    more = [_padded(v) for v in more]
    if family == "roformer":  # no rotation of keys in front
        rotation = more[1] if len(more) > 1 else given["sinusoidal_pos"]
        still = torch.cat([torch.zeros(P, size // 2), torch.ones(P, size // 2)], dim=-1)
        rotation = torch.cat([still.view(1, 1, P, size), rotation], dim=2)
        more, given = [more[0]] if more else [], {**given, "sinusoidal_pos": rotation}
    expected = theirs(_longer(states, extra), *more, **given)
    expected, y = (v[0] if isinstance(v, tuple) else v for v in (expected, y))
    torch.testing.assert_close(y, expected[:, P:], atol=1e-5, rtol=1e-4)
    found = tuning.liveness({"input_ids": torch.randint(3, WORDS, (2, TOKENS)), "attention_mask": mask})
    assert all("crossattention" in name for name in found.dead)  # BLIP's, which a text alone does not enter


@torch.no_grad()
def test_canine_attends_from_one_sequence_to_another() -> None:
    torch.manual_seed(0)
    words = {k: v for k, v in TEXT.items() if k != "vocab_size"}
    model = _strong(hf.CanineModel(hf.CanineConfig(**words, num_hash_buckets=64, local_transformer_stride=4)))
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    extra, x = torch.randn(1, P, 32), torch.randn(2, 8, 32)
    for placement in tuning.placements:
        theirs = plain.get_submodule(placement.home)
        made = [layer(extra)[0].view(P, 4, 8) for layer in (theirs.key, theirs.value)]
        placement.part.tokens.copy_(torch.stack(made))
        mask = torch.randint(0, 2, (2, 8, 8)).float()
        mask[..., 0] = 1
        ours = model.get_submodule(placement.home)(x, x, mask)[0]
        torch.testing.assert_close(ours, theirs(x, _longer(x, extra), F.pad(mask, (P, 0), value=1))[0])
    assert tuning.liveness({"input_ids": torch.randint(3, WORDS, (2, 32))}).ok


@torch.no_grad()
def test_swin_v2_has_cosines() -> None:
    torch.manual_seed(0)
    config = hf.Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    model = hf.Swinv2Model(config).eval()
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    for placement in tuning.placements:
        ours, theirs = model.get_submodule(placement.home), plain.get_submodule(placement.home)
        x = torch.randn(8, 16, 16)
        mask = torch.where(torch.rand(4, 16, 16) < 0.3, -100.0, 0.0)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (theirs.query, theirs.key, theirs.value))
        keys, values = placement.part.keys_and_values().transpose(1, 2).unsqueeze(1).expand(-1, 8, -1, -1, -1)
        scale = theirs.logit_scale.clamp(max=torch.tensor(100.0).log()).exp()
        table = theirs.continuous_position_bias_mlp(theirs.relative_coords_table).view(-1, 2)
        bias = 16 * torch.sigmoid(table[theirs.relative_position_index.view(-1)].view(16, 16, 2).permute(2, 0, 1))
        q, k, keys = (F.normalize(t, dim=-1) for t in (q, k, keys))
        own = q @ k.mT * scale + bias + 2 * mask.repeat(2, 1, 1)[:, None]  # the model adds its mask twice
        share = torch.cat([q @ keys.mT * scale, own], dim=-1).softmax(-1)
        expected = (share @ torch.cat([values, v], dim=2)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(ours(x, mask)[0], expected, atol=1e-5, rtol=1e-5)
    assert tuning.liveness({"pixel_values": torch.randn(2, 3, 32, 32)}).ok


@torch.no_grad()
def test_scores_capped_or_shifted_for_all_keys_are_so_for_learned_ones() -> None:
    """LayoutLMv3 takes the largest score off before its softmax; others cap scores by tanh."""
    from mmpeft.parts.attention import attend
    from mmpeft.parts.prefix import Prefix

    part = Prefix(P, 2, 4, torch.zeros(()), attend)
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    mask = torch.where(torch.rand(5, 5) < 0.3, -1e4, 0.0)

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) / 2.0) * 3.0
        scores = scores + mask
        scores = scores - scores.amax(dim=-1, keepdim=True)
        return F.softmax(scores * 1.5, dim=-1) @ v

    keys, values = (t.expand(2, -1, -1, -1) for t in part.keys_and_values().transpose(1, 2)[:, None])
    expected = attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), F.pad(mask, (P, 0)))
    torch.testing.assert_close(attend(nn.Identity(), attention, [part], (q, k, v, mask), {}), expected)


SPARSE = r"block-sparse|no way in|does not run on the example|'kv' .*matches no site"
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "bigbird": lambda: hf.BigBirdModel(
        hf.BigBirdConfig(**TEXT, attention_type="block_sparse", block_size=2, num_random_blocks=1)
    ),
    "nystromformer": lambda: hf.NystromformerModel(
        hf.NystromformerConfig(**TEXT, num_landmarks=2, segment_means_seq_len=8)
    ),
    "longformer": lambda: hf.LongformerModel(hf.LongformerConfig(**TEXT, attention_window=2)),
    "yoso": lambda: hf.YosoModel(hf.YosoConfig(**TEXT)),
}


@pytest.mark.parametrize("method", [mmpeft.PTuningV2(), mmpeft.PrefixTuning(), mmpeft.LLaMAAdapter()], ids=str)
@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_softmax_over_all_keys_is_refused_at_attach(family: str, method: mmpeft.Method) -> None:
    model = REFUSED[family]()
    names = [type(m) for m in model.modules()]
    with pytest.raises((Refused, SiteError), match=SPARSE):
        mmpeft.attach(model, method)
    assert [type(m) for m in model.modules()] == names


def test_nothing_alive_is_reported() -> None:
    """A model whose output no trainable tensor reaches."""
    model = hf.ViTModel(hf.ViTConfig(**VIT))
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    model.forward = lambda pixel_values: pixel_values * 2  # type: ignore[method-assign]
    found = tuning.liveness({"pixel_values": torch.randn(1, 3, 32, 32)})
    assert len(found.dead) == len(found.pulses) == 2
    assert not found.moved
