"""Every configuration of open_clip, at its own widths and sizes, with two layers a tower and a small vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
import transformers
from open_clip import coca_model, hf_model, model, timm_model
from torch import nn

LAYERS = 2
WORDS = 512
"""Size of the vocabulary: of a million rows no test reads more."""

DEPTHS: dict[str, dict[str, Any]] = {
    "convnext": {"depths": (1, 1, 2, 1)},
    "swin": {"depths": (2, 2, 2, 2)},
    "fastvit": {"layers": (1, 1, 1, 1)},
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1)},
    "fastvit_mci4": {"layers": (1, 1, 1, 1, 1)},
    "vit": {"depth": LAYERS},
    "eva": {"depth": LAYERS},
}
"""What makes a timm tower shallow, by the longest beginning of its name."""


KINDS = (
    "EVA02-B-16", "MobileCLIP-S1", "RN50", "ViT-B-16-SigLIP", "ViT-B-32", "ViTamin-S", "coca_ViT-B-32", "convnext_base",
    "roberta-ViT-B-32", "swin_base_patch4_window7_224",
)  # fmt: skip
"""One configuration of each kind of towers."""


def tried(name: str) -> tuple[str, ...]:
    """Every method on one configuration of each kind; LoRA alone on the others, which have other widths and sizes."""
    return () if name in KINDS else ("LoRA",)


def names() -> list[str]:
    """Configurations of the installed open_clip."""
    return sorted(open_clip.list_models())


def build(name: str) -> nn.Module:
    """The configuration with few layers and random weights, the same in every call, without a download."""
    config = _shallow(deepcopy(open_clip.get_model_config(name)))
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = coca_model.CoCa if "multimodal_cfg" in config else model.CustomTextCLIP if custom else model.CLIP
    torch.manual_seed(0)
    with _shallow_timm(), _local_configurations():
        return kind(**config)  # type: ignore[no-any-return]


def _shallow(config: dict[str, Any]) -> dict[str, Any]:
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part in (vision, text, config.get("multimodal_cfg", {})):
        if "layers" in part:
            part["layers"] = [1, 1, 1, 1] if isinstance(part["layers"], list) else LAYERS
        if "vocab_size" in part:
            part["vocab_size"] = WORDS
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if text.get("eos_id") is not None:
        text["eos_id"] = min(text["eos_id"], WORDS - 1)
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    return config


@contextmanager
def _shallow_timm() -> Iterator[None]:
    create = timm.create_model

    def shallow(name: str, **kwargs: Any) -> nn.Module:
        longest = max((key for key in DEPTHS if name.startswith(key)), key=len)
        return create(name, **DEPTHS[longest], **kwargs)  # type: ignore[no-any-return]

    with mock.patch.object(timm_model.timm, "create_model", shallow):
        yield


@contextmanager
def _local_configurations() -> Iterator[None]:
    """Configurations of text towers that would come from the hub: of the right type and width, but small."""
    with mock.patch.object(hf_model.AutoConfig, "from_pretrained", _configuration):
        yield


def _configuration(name: str) -> transformers.PretrainedConfig:
    few: dict[str, Any] = {"vocab_size": WORDS}
    if "mt5" in name:
        wide = {"d_model": 2048, "d_ff": 5120, "num_heads": 32} if "xl" in name else {"d_model": 768, "d_ff": 2048}
        return transformers.MT5Config(**few, **{"num_heads": 12, **wide}, num_layers=LAYERS, num_decoder_layers=1)
    if "nllb" in name:
        few |= {"d_model": 1024, "encoder_layers": LAYERS, "decoder_layers": 1, "max_position_embeddings": 1024}
        return transformers.M2M100Config(**few, encoder_ffn_dim=4096, encoder_attention_heads=16)
    large = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096} if "large" in name else {}
    kind = transformers.XLMRobertaConfig if "xlm" in name else transformers.RobertaConfig
    return kind(**few, **large, num_hidden_layers=LAYERS, max_position_embeddings=514, type_vocab_size=1)
