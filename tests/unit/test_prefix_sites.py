"""Learned keys and values in vision, vision-language and diffusion models: `softmax(q [K_p; K]ᵀ) [V_p; V]` by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm.models.vision_transformer as vit
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import Refused
from mmpeft.functional.attention import prefix_mask
from mmpeft.sites import sites
from tests.matrix.families import FAMILIES
from tests.support.shares import of_today

P = 3


def _reference(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """For q, k, v [B, h, n, d], scaled already, and a prefix [2, p, h, d]; `bias` is that of the text alone."""
    keys, values = prefix.transpose(1, 2).unsqueeze(1).expand(-1, len(q), -1, -1, -1)
    scores = torch.cat([q @ keys.mT, q @ k.mT + bias], dim=-1)
    return (scores.softmax(-1) @ torch.cat([values, v], dim=2)).transpose(1, 2).flatten(2)


@contextmanager
def _calls(module: nn.Module) -> Iterator[list[tuple[Any, Any, Any]]]:
    """What a module is called with, and what it answers."""
    seen: list[tuple[Any, Any, Any]] = []
    handle = module.register_forward_hook(lambda m, a, k, y: seen.append((a, k, y)), with_kwargs=True)
    yield seen
    handle.remove()


def _tuned(family: str, path: str) -> tuple[Any, Any, Tensor, tuple[Any, Any, Any]]:
    """The model, the attention at `path`, its prefix, and its call with the tuning in use."""
    example = FAMILIES[family]()
    tuning = mmpeft.attach(example.model, mmpeft.PTuningV2(tokens=P))
    module = example.model.get_submodule(path)
    (part,) = (p.part for p in tuning.placements if p.home == path)
    with _calls(module) as seen:
        example.answer()
    return example, module, part.keys_and_values(), seen[0]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


def _fused_qkv(module: Any, x: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    found = F.linear(x, module.qkv.weight, module.qkv.bias if bias is None else bias)
    return [_heads(part, module.num_heads) for part in found.chunk(3, dim=-1)]


@torch.no_grad()
def test_vit() -> None:
    _, module, prefix, ((x,), _, y) = _tuned("vit", "blocks.1.attn")
    q, k, v = _fused_qkv(module, x)
    _close(y, module.proj(_reference(q * module.scale, k, v, prefix)))


@torch.no_grad()
def test_written_out_is_the_same_as_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    example, _, _, _ = _tuned("vit", "blocks.1.attn")
    fused = example.answer()
    for block in example.model.blocks:
        block.attn.fused_attn = False
    _close(example.answer(), fused)


@torch.no_grad()
def test_eva_with_rotary_positions() -> None:
    """The prefix carries no position, so that it is the same before and after the rotation of the others."""
    _, module, prefix, ((x,), kwargs, y) = _tuned("eva02", "blocks.1.attn")
    q, k, v = _fused_qkv(module, x, torch.cat([module.q_bias, module.k_bias, module.v_bias]))
    q, k = (torch.cat([t[:, :, :1], apply_rot_embed_cat(t[:, :, 1:], kwargs["rope"])], dim=2) for t in (q, k))
    _close(y, module.proj(module.norm(_reference(q * module.scale, k, v, prefix))))


@torch.no_grad()
def test_beit_with_relative_positions() -> None:
    _, module, prefix, ((x,), _, y) = _tuned("beit", "blocks.1.attn")
    q, k, v = _fused_qkv(module, x, torch.cat([module.q_bias, module.k_bias, module.v_bias]))
    _close(y, module.proj(_reference(q * module.scale, k, v, prefix, module._get_rel_pos_bias())))


def _window_bias(module: Any, bias: Tensor, kwargs: Any, batch: int) -> Tensor:
    mask = kwargs.get("mask")
    return bias if mask is None else bias + mask.repeat(batch // len(mask), 1, 1)[:, None]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("block", [0, 1])  # the second one shifts its windows, and has a mask
@torch.no_grad()
def test_swin(block: int, fused: bool) -> None:
    path = f"layers.0.blocks.{block}.attn"
    example, module, prefix, _ = _tuned("swin", path)
    module.fused_attn = fused
    with _calls(module) as seen:
        example.answer()
    (x,), kwargs, y = seen[0]
    q, k, v = _fused_qkv(module, x)
    bias = _window_bias(module, module._get_rel_pos_bias(), kwargs, len(x))
    _close(y, module.proj(_reference(q * module.scale, k, v, prefix, bias)))


@pytest.mark.parametrize("block", [0, 1])
@torch.no_grad()
def test_swinv2_has_cosines(block: int) -> None:
    _, module, prefix, ((x,), kwargs, y) = _tuned("swinv2", f"layers.0.blocks.{block}.attn")
    q, k, v = _fused_qkv(module, x, torch.cat([module.q_bias, module.k_bias, module.v_bias]))
    q = F.normalize(q, dim=-1) * module.logit_scale.clamp(max=torch.tensor(100.0).log()).exp()
    prefix = torch.stack([F.normalize(prefix[0], dim=-1), prefix[1]])
    table = module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads)
    area = module.window_size[0] * module.window_size[1]
    table = table[module.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
    bias = _window_bias(module, 16 * torch.sigmoid(table)[None], kwargs, len(x))
    _close(y, module.proj(_reference(q, F.normalize(k, dim=-1), v, prefix, bias)))


@pytest.mark.parametrize("tower", ["transformer", "visual.transformer"])
@torch.no_grad()
def test_open_clip(tower: str) -> None:
    """The text is causal: word i sees the prefix and the words up to i."""
    _, module, prefix, ((x, *_), kwargs, (y, weights)) = _tuned("open_clip", f"{tower}.resblocks.1.attn")
    assert weights is None
    assert (kwargs["attn_mask"] is not None) == (tower == "transformer")
    q, k, v = (
        _heads(t, module.num_heads) for t in F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    )
    bias = 0.0 if kwargs["attn_mask"] is None else kwargs["attn_mask"]
    _close(y, module.out_proj(_reference(q * module.head_dim**-0.5, k, v, prefix, bias)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_multihead_attention_in_either_layout(batch_first: bool, causal: bool) -> None:
    _, module, _, ((x, *_), kwargs, (y, _)) = _tuned("open_clip", "transformer.resblocks.1.attn")
    mask = kwargs["attn_mask"] if causal else None
    expected = module(x, x, x, need_weights=False, attn_mask=mask)[0]
    if causal:
        _close(module(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0], expected)
        _close(expected, y)
    padded = torch.zeros(x.shape[:2], dtype=torch.bool)
    _close(module(x, x, x, need_weights=False, attn_mask=mask, key_padding_mask=padded)[0], expected)
    module.batch_first = batch_first
    if not batch_first:
        x = x.transpose(0, 1)
        _close(module(x, x, x, need_weights=False, attn_mask=mask)[0].transpose(0, 1), expected)
    with pytest.raises(Refused, match="need_weights=False"):
        module(x, x, x)


@torch.no_grad()
def test_unet_cross_attention() -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    _, module, prefix, ((x,), kwargs, y) = _tuned("sd_unet", path)
    q, k, v = (
        _heads(getattr(module, f"to_{name}")(t), module.heads)
        for name, t in zip("qkv", (x, *[kwargs["encoder_hidden_states"]] * 2))
    )
    _close(y, module.to_out[0](_reference(q * module.scale, k, v, prefix)))


@torch.no_grad()
def test_padded_words_stay_hidden_behind_a_prefix() -> None:
    example, *_ = _tuned("sd_unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    batch = dict(example.batch)
    mask = torch.ones(batch["encoder_hidden_states"].shape[:2])
    mask[:, -2:] = 0
    shorter = {**batch, "encoder_hidden_states": batch["encoder_hidden_states"][:, :-2]}
    _close(example(batch={**batch, "encoder_attention_mask": mask}), example(batch=shorter))


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("vit", "blocks.1.attn"),
        ("eva02_unfused", "blocks.1.attn"),
        ("swinv2", "layers.0.blocks.1.attn"),
        ("open_clip", "transformer.resblocks.1.attn"),
        ("open_clip", "visual.transformer.resblocks.1.attn"),
        ("sd_unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2"),
        ("flux", "transformer_blocks.0.attn"),
    ],
)
@torch.no_grad()
def test_a_gate_opens_a_second_softmax(family: str, path: str) -> None:
    """`attention + tanh(g) softmax(q K_pᵀ) V_p` is linear in `tanh(g)`, and closed it changes no bit."""
    example = FAMILIES[family]()
    plain = example.answer()
    tuning = mmpeft.attach(
        example.model, mmpeft.LLaMAAdapter(tokens=P, at=lambda site: site.path == path and site.role == "kv")
    )
    assert torch.equal(example.answer(), plain)
    (placement,) = tuning.placements
    module = example.model.get_submodule(path)
    answers = []
    for gate in (0.0, 0.5, -0.5):
        placement.part.gate.fill_(gate)
        with _calls(module) as seen:
            example.answer()
        y = seen[0][2]
        answers.append(y[0] if isinstance(y, tuple) else y)
    assert not torch.allclose(answers[1], answers[0], atol=1e-4)
    _close((answers[1] + answers[2]) / 2, answers[0])


@torch.no_grad()
def test_the_gated_attention_by_hand() -> None:
    """Keys and values of the tokens are projected by the layer's own rows of a fused projection, bias included."""
    example = FAMILIES["beit"]()
    tuning = mmpeft.attach(example.model, mmpeft.LLaMAAdapter(tokens=P, layers=1))
    (placement,) = tuning.placements
    module, part = example.model.blocks[2].attn, placement.part
    part.gate.fill_(0.7)
    with _calls(module) as seen:
        example.answer()
    (x,), _, y = seen[0]
    bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])
    q, k, v = _fused_qkv(module, x, bias)
    _, keys, values = _fused_qkv(module, part.tokens[None], bias)
    own = ((q * module.scale @ k.mT + module._get_rel_pos_bias()).softmax(-1) @ v).transpose(1, 2).flatten(2)
    learned = ((q * module.scale @ keys.mT).softmax(-1) @ values).transpose(1, 2).flatten(2)
    _close(y, module.proj(own + torch.tanh(torch.tensor(0.7)) * learned))


@pytest.mark.parametrize("family", ["vit", "swin", "swinv2", "open_clip", "sd_unet"])
@torch.no_grad()
def test_several_parts_enter_the_same_attention(family: str) -> None:
    """Two prefixes are one of both lengths, with or without a gated one beside them."""
    example = FAMILIES[family]()
    method = mmpeft.PTuningV2(tokens=P) + mmpeft.PTuningV2(tokens=2) + mmpeft.LLaMAAdapter(tokens=P)
    tuning = mmpeft.attach(example.model, method)
    both = example.answer()
    third = len(tuning.placements) // 3
    parts = [[p.part for p in tuning.placements[i * third : (i + 1) * third]] for i in range(3)]
    assert [{type(part).__name__ for part in own} for own in parts] == [{"Prefix"}, {"Prefix"}, {"GatedPrefix"}]
    joined = FAMILIES[family]()
    one = mmpeft.attach(joined.model, mmpeft.PTuningV2(tokens=P + 2))
    for a, b, c in zip(parts[0], parts[1], (p.part for p in one.placements)):
        c.tokens.copy_(torch.cat([a.tokens, b.tokens], dim=1))
    _close(joined.answer(), both)
    for part in parts[2]:
        part.gate.fill_(0.5)
    assert not torch.allclose(example.answer(), both, atol=1e-4)


def test_two_softmaxes_are_refused() -> None:
    for options in ({"attn_layer": "diff"}, {"block_fn": vit.DiffParallelScalingBlock}):
        model = vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, **options)
        with pytest.raises(Refused, match="several attentions in one pass"):
            mmpeft.attach(model, mmpeft.PTuningV2())


def test_other_attention_processors_are_refused() -> None:
    example = FAMILIES["sd_unet"]()
    example.model.set_attn_processor(AttnProcessor())
    with pytest.raises(Refused, match="AttnProcessor2_0"):
        mmpeft.attach(example.model, mmpeft.PTuningV2())
    example = FAMILIES["sd_unet"]()
    mmpeft.attach(example.model, mmpeft.PTuningV2())
    example.model.set_attn_processor(AttnProcessor())
    with pytest.raises(Refused, match="computed 0 attentions"):
        example.answer()


def test_sites_say_the_shape_of_keys() -> None:
    for family in ("vit", "swin", "open_clip", "sd_unet", "flux"):
        found = [site for site in sites(FAMILIES[family]().model) if site.role == "kv"]
        assert found
        assert all(site.heads * site.width > 0 and site.depth >= 0 for site in found)


def test_masks_grow_by_visible_columns() -> None:
    device = torch.device("cpu")
    assert prefix_mask(None, False, 2, 3, 3, device) is None
    causal = prefix_mask(None, True, 2, 3, 3, device)
    assert causal is not None
    assert causal.tolist() == [[True, True, *row] for row in torch.ones(3, 3).tril().bool().tolist()]
    scores = prefix_mask(torch.full((1, 1), -1.0), False, 2, 3, 3, device)
    assert scores is not None
    assert scores.tolist() == [[0, 0, -1, -1, -1]]


@pytest.mark.parametrize("family", of_today(["swinv2", "open_clip", "sd_unet", "flux"], lambda family: ("compiled",)))
def test_compiled(family: str) -> None:
    example = FAMILIES[family]()
    mmpeft.attach(example.model, mmpeft.PTuningV2(tokens=P))
    torch._dynamo.reset()
    torch.testing.assert_close(example(torch.compile(example.model, backend="eager")), example(), atol=1e-5, rtol=1e-5)
