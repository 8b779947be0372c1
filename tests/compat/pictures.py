"""Tiny vision-language models of transformers, each with a prompt that holds one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WORDS, IMAGE = 64, 60
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": WORDS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
PLAIN = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
Built = tuple[Any, dict[str, Any]]


def _text(kind: str, **options: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": kind, **options}


def _eye(kind: str, **options: Any) -> dict[str, Any]:
    return {**EYE, "model_type": kind, **options}


def _prompt(tokens: int, around: tuple[int, ...] = ()) -> torch.Tensor:
    """Words with `tokens` places for a picture."""
    return torch.tensor([[1, 5, *around[:1], *[IMAGE] * tokens, *around[1:], 7, 8]])


def _picture(*lead: int, size: int = 16) -> torch.Tensor:
    return torch.randn(*(lead or (1,)), 3, size, size)


def _make(name: str, head: str = "ForConditionalGeneration", **config: Any) -> Any:
    import transformers as hf

    return getattr(hf, name + head)(getattr(hf, f"{name}Config")(**config))


_LLAVA: dict[str, Any] = {
    "vision_config": _eye("clip_vision_model"),
    "text_config": _text("llama"),
    "image_token_index": IMAGE,
    "image_token_id": IMAGE,
}


def _llava(name: str, **more: Any) -> Built:
    return _make(name, **_LLAVA, image_seq_length=4, **more), {"input_ids": _prompt(4), "pixel_values": _picture()}


def _tiled(name: str, tokens: int, **more: Any) -> Built:
    model = _make(name, **{**_LLAVA, "image_grid_pinpoints": [[16, 16]], **more})
    inputs = {"pixel_values": _picture(1, 2), "image_sizes": torch.tensor([[16, 16]])}
    return model, {"input_ids": _prompt(tokens), **inputs}


def _paligemma() -> Built:
    eye = _eye("siglip_vision_model", projection_dim=32)
    more = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32}
    model = _make("PaliGemma", vision_config=eye, text_config=_text("gemma"), **more)
    return model, {"input_ids": _prompt(4), "pixel_values": _picture()}


def _gemma3() -> Built:
    more = {"image_token_index": IMAGE, "image_token_id": IMAGE, "boi_token_index": 61, "eoi_token_index": 62}
    eye, text = _eye("siglip_vision_model"), _text("gemma3_text")
    model = _make("Gemma3", vision_config=eye, text_config=text, mm_tokens_per_image=4, **more)
    ids = _prompt(4, (61, 62))
    return model, {"input_ids": ids, "pixel_values": _picture(), "token_type_ids": (ids == IMAGE).long()}


_QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2}
_QWEN |= {"temporal_patch_size": 2}


def _qwen(name: str, **eye: Any) -> Built:
    text = {**TEXT, "rope_scaling": ROPE, "rope_parameters": ROPE}
    more = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    model = _make(name, vision_config={**_QWEN, **eye}, text_config=text, **more)
    ids = _prompt(4, (62, 63))
    inputs = {"pixel_values": torch.randn(16, 3 * 2 * 64), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return model, {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **inputs}


def _idefics(name: str) -> Built:
    model = _make(name, vision_config=EYE, text_config=_text("llama"), image_token_id=IMAGE, scale_factor=2)
    return model, {"input_ids": _prompt(1), "pixel_values": _picture(1, 1)}


def _aya() -> Built:
    more = {"downsample_factor": 2, "adapter_layer_norm_eps": 1e-6, "alignment_intermediate_size": 48}
    config = {**_LLAVA, "vision_config": _eye("siglip_vision_model"), "text_config": _text("cohere2")}
    return _make("AyaVision", **config, **more), {"input_ids": _prompt(1), "pixel_values": _picture()}


def _internvl() -> Built:
    eye = _eye("internvl_vision", image_size=[16, 16], patch_size=[8, 8])
    config = {"vision_config": eye, "text_config": _text("qwen2"), "image_token_id": IMAGE}
    return _make("InternVL", **config, downsample_ratio=0.5), {"input_ids": _prompt(1), "pixel_values": _picture()}


def _mistral3() -> Built:
    eye = _eye("pixtral", head_dim=8, image_size=32)
    config = {**_LLAVA, "vision_config": eye, "text_config": _text("mistral"), "spatial_merge_size": 2}
    inputs = {"pixel_values": _picture(size=32), "image_sizes": torch.tensor([[32, 32]])}
    return _make("Mistral3", **config, vision_feature_layer=-1), {"input_ids": _prompt(4), **inputs}


def _got() -> Built:
    eye = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48}
    eye |= {"image_size": 64, "patch_size": 4, "window_size": 4, "global_attn_indexes": [1]}
    more = {"image_token_index": IMAGE, "image_token_id": IMAGE}
    model = _make("GotOcr2", vision_config=eye, text_config=_text("qwen2"), **more)
    return model, {"input_ids": _prompt(16), "pixel_values": _picture(size=64)}


def _blip2(name: str) -> Built:
    former = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    former |= {"num_attention_heads": 4, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    more = {"num_query_tokens": 3, "image_token_index": IMAGE, "image_token_id": IMAGE}
    model = _make(name, vision_config=EYE, qformer_config=former, text_config=_text("llama"), **more)
    inputs: dict[str, Any] = {"input_ids": _prompt(3), "pixel_values": _picture()}
    if name == "InstructBlip":
        inputs |= {"qformer_input_ids": torch.tensor([[5, 6]]), "qformer_attention_mask": torch.ones(1, 2).long()}
    return model, inputs


def _git() -> Built:
    model = _make("Git", "ForCausalLM", vision_config=EYE, **PLAIN)
    return model, {"input_ids": torch.tensor([[1, 5, 6]]), "pixel_values": _picture()}


def _mllama() -> Built:
    eye = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    eye |= {"attention_heads": 4, "image_size": 16, "patch_size": 8, "vision_output_dim": 64}
    eye |= {"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    text = {**TEXT, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}}
    model = _make("Mllama", vision_config=eye, text_config=text, image_token_index=IMAGE)
    ones = {"aspect_ratio_ids": (1, 1), "aspect_ratio_mask": (1, 1, 1), "cross_attention_mask": (1, 4, 1, 1)}
    inputs = {name: torch.ones(*shape).long() for name, shape in ones.items()}
    return model, {"input_ids": torch.tensor([[1, IMAGE, 5, 6]]), "pixel_values": _picture(1, 1, 1), **inputs}


def _janus() -> Built:
    eye = _eye("janus_vision_model", projection_dim=32, depth=2, num_image_tokens=4)
    codes = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1}
    codes |= {"channel_multiplier": [1, 1], "projection_dim": 32, "num_patches": 4, "image_token_embed_dim": 32}
    model = _make("Janus", text_config=_text("llama"), vision_config=eye, vq_config=codes, image_token_id=IMAGE)
    return model, {"input_ids": _prompt(4), "pixel_values": _picture()}


def _vision_encoder_decoder() -> Built:
    import transformers as hf

    words = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    decoder = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, add_cross_attention=True, **words)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**EYE), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return hf.VisionEncoderDecoderModel(config=config), {"pixel_values": _picture()}


def _blip() -> Built:
    text = {**PLAIN, "sep_token_id": 2, "encoder_hidden_size": 32}
    model = _make("Blip", vision_config=EYE, text_config=text, image_text_hidden_size=16, projection_dim=16)
    return model, {"input_ids": torch.tensor([[1, 5, 6]]), "pixel_values": _picture()}


PICTURED: dict[str, Callable[[], Built]] = {
    "llava": lambda: _llava("Llava"),
    "vipllava": lambda: _llava("VipLlava", vision_feature_layers=[-1, -2]),
    "llava_next": lambda: _tiled("LlavaNext", 10),
    "llava_onevision": lambda: _tiled(
        "LlavaOnevision", 10, vision_config=_eye("siglip_vision_model"), text_config=_text("qwen2")
    ),
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "qwen2_vl": lambda: _qwen("Qwen2VL", embed_dim=32, mlp_ratio=2),
    "qwen2_5_vl": lambda: _qwen(
        "Qwen2_5_VL", out_hidden_size=32, intermediate_size=48, window_size=32, fullatt_block_indexes=[1]
    ),
    "qwen3_vl": lambda: _qwen(
        "Qwen3VL",
        out_hidden_size=32,
        intermediate_size=48,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "aya_vision": _aya,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "got_ocr2": _got,
    "blip2": lambda: _blip2("Blip2"),
    "instructblip": lambda: _blip2("InstructBlip"),
    "git": _git,
    "mllama": _mllama,
    "janus": _janus,
    "vision_encoder_decoder": _vision_encoder_decoder,
    "blip": _blip,
}


def pictured(name: str) -> Built:
    """A model in eval mode and the arguments of `generate`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = PICTURED[name]()
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.eval(), inputs
