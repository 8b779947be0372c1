"""Tiny models of open_clip's families, built from the real classes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor
from transformers import RobertaConfig

from tests.matrix.example import BATCH, Example, enliven
from tests.support.copies import copies

WIDTH, WORDS, CONTEXT = 32, 60, 8
VISION: dict[str, Any] = {"layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 8, "image_size": 32}
TIMM: dict[str, Any] = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
TEXT: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": WORDS, "width": WIDTH, "heads": 4, "layers": 2}


def _features(output: Any) -> Tensor:
    """Of a pair of towers, and of CoCa its captions: one row a sample."""
    if isinstance(output, dict):
        output = [output["image_features"], output["text_features"], output["logits"].flatten(1)]
    return torch.cat(list(output[:2]) if isinstance(output, tuple) else output, dim=-1)


def _words() -> Tensor:
    words = torch.randint(3, WORDS - 1, (BATCH, CONTEXT))
    words[:, -2:] = torch.tensor([WORDS - 1, 0])  # end of text, then padding
    return words


def _build(make: Callable[[], Any], size: int = 32) -> Example:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        enliven(model)
        return Example(model, {"image": torch.randn(BATCH, 3, size, size), "text": _words()}, _features)


def _timm_and_hf() -> CustomTextCLIP:
    """A timm image tower and a transformers text tower; open_clip itself would ask a hub for the latter."""
    model = CustomTextCLIP(embed_dim=16, vision_cfg=TIMM, text_cfg=TEXT)
    config = RobertaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=WORDS,
        max_position_embeddings=CONTEXT + 2,
    )
    model.text = HFTextEncoder("", output_dim=16, config=config, pooler_type="mean_pooler", proj_type="linear")
    model.text.transformer.pooler = None  # as open_clip leaves it out of pretrained towers that pool themselves
    return model


def _coca() -> CoCa:
    pooling = {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {**TEXT, "mlp_ratio": 2, "dim_head": 8}
    return CoCa(WIDTH, multimodal_cfg=decoder, text_cfg=text, vision_cfg={**VISION, **pooling})


FAMILIES: dict[str, Callable[[], Example]] = copies(
    {
        "open_clip": partial(_build, partial(CLIP, embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)),
        "open_clip_timm_hf": partial(_build, _timm_and_hf, 160),
        "coca": partial(_build, _coca),
    }
)
