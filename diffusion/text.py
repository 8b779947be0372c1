"""The text tower of an open_clip pair as transformers' CLIPTextModel, which is the same network by other names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from mmpeft.embedded.store import differences, read_card, read_weights
from mmpeft.errors import ConfigError
from mmpeft.types import Untyped


def text_encoder(folder: Path) -> tuple[CLIPTextModel, Untyped]:
    """Text encoder and tokenizer of a pair in open_clip's folder layout.

    Raises:
        ConfigError: the pair has another text tower than CLIP's.
    """
    facts = read_card(folder / "open_clip_config.json")["model_cfg"]["text_cfg"]
    if "hf_model_name" in facts or facts.get("pool_type", "argmax") != "argmax" or facts.get("no_causal_mask"):
        raise ConfigError(f"the text tower of {folder} is not CLIP's: only that one has a twin in transformers")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=facts["vocab_size"],
            hidden_size=facts["width"],
            intermediate_size=4 * facts["width"],
            num_hidden_layers=facts["layers"],
            num_attention_heads=facts["heads"],
            max_position_embeddings=facts["context_length"],
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tensors = renamed(read_weights(folder / "open_clip_model.safetensors"))
    prefix = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    tensors = {prefix + key: tensor for key, tensor in tensors.items()}
    problem = differences(model, tensors)
    if problem:
        raise ConfigError(f"the text tower of {folder} does not fit transformers' CLIPTextModel: {problem}")
    model.load_state_dict(tensors)
    return model.eval(), tokenizer


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names for a text tower to transformers'."""
    found = {
        "embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "embeddings.position_embedding.weight": tensors["positional_embedding"],
        "final_layer_norm.weight": tensors["ln_final.weight"],
        "final_layer_norm.bias": tensors["ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    for key, tensor in tensors.items():
        if not key.startswith("transformer.resblocks."):
            continue
        _, _, layer, rest = key.split(".", 3)
        owner, _, kind = rest.rpartition(".")
        if rest.startswith("attn.in_proj_"):
            for name, part in zip("qkv", torch.chunk(tensor, 3)):
                found[f"encoder.layers.{layer}.self_attn.{name}_proj.{rest.rpartition('_')[2]}"] = part.clone()
        else:
            found[f"encoder.layers.{layer}.{names[owner]}.{kind}"] = tensor
    return {key: tensor.float() for key, tensor in found.items()}
