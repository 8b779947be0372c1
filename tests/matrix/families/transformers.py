"""Tiny models of transformers' families, built from the real classes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.matrix.example import BATCH, Example, enliven, first
from tests.support.copies import copies

TOKENS, WORDS = 6, 60
LM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**LM, "num_key_value_heads": 2, "head_dim": 8}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": WORDS}


def embeds(output: Any) -> Tensor:
    """Of a pair of towers: the logits of every image with every text would mix the rows."""
    return torch.cat([output.image_embeds, output.text_embeds], dim=-1)


def _build(
    cls: type[nn.Module], config: Any, inputs: str, read: Callable[[Any], Tensor] = first, **options: Any
) -> Example:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(**options)).eval()
        enliven(model)
        words = torch.randint(3, WORDS, (BATCH, TOKENS))
        batch = {
            "input_ids": words,
            "decoder_input_ids": words.flip(1),
            "attention_mask": torch.tensor([[1] * TOKENS, [1] * TOKENS, [0, 0] + [1] * (TOKENS - 2), [1] * TOKENS]),
            "pixel_values": torch.randn(BATCH, 3, 32, 32),
        }
    return Example(model, {name: batch[name] for name in inputs.split()}, read)


_text, _image = "input_ids attention_mask", "pixel_values"
_pair = {"text_config": {**LM, "max_position_embeddings": 16}, "vision_config": VIT}

FAMILIES: dict[str, Callable[[], Example]] = copies(
    {
        "llama": partial(_build, hf.LlamaForCausalLM, hf.LlamaConfig, _text, **GQA),
        "gemma2": partial(_build, hf.Gemma2ForCausalLM, hf.Gemma2Config, _text, **GQA),
        "phi": partial(_build, hf.PhiForCausalLM, hf.PhiConfig, _text, **LM),
        "phi3": partial(_build, hf.Phi3ForCausalLM, hf.Phi3Config, _text, **GQA),
        "gpt2": partial(
            _build, hf.GPT2LMHeadModel, hf.GPT2Config, _text, n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS
        ),
        "gpt_neox": partial(_build, hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, _text, **LM),
        "bert": partial(_build, hf.BertForSequenceClassification, hf.BertConfig, _text, **LM),
        "t5": partial(
            _build,
            hf.T5ForConditionalGeneration,
            hf.T5Config,
            "input_ids attention_mask decoder_input_ids",
            feed_forward_proj="gated-gelu",
            **T5,
        ),
        "hf_vit": partial(_build, hf.ViTForImageClassification, hf.ViTConfig, _image, num_labels=5, **VIT),
        "hf_clip": partial(
            _build, hf.CLIPModel, hf.CLIPConfig, f"{_text} {_image}", embeds, projection_dim=16, **_pair
        ),
        "hf_siglip": partial(_build, hf.SiglipModel, hf.SiglipConfig, f"{_text} {_image}", embeds, **_pair),
    }
)
