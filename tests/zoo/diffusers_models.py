"""Every denoiser that diffusers exports, with a tiny configuration."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import torch
from torch import nn

DENOISER = re.compile(r"Transformer|UNet|UVit|UniDiffuser|ControlNet|DiT|T5FilmDecoder")
PARTS = re.compile(r"Vae|VAE|Multi\w*ControlNet|Adapter|Autoencoder|Decoder$(?<!T5FilmDecoder)|Tokenizer")
"""Wrappers of several models, and parts that only another model runs."""

SMALL: dict[str, Any] = {
    "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "n_layers": 2, "n_refiner_layers": 1,
    "num_mmdit_layers": 1, "num_single_dit_layers": 1, "mmdit_layers": 2, "transformer_num_layers": 2, "depth": 2,
    "num_hidden_layers": 2, "num_text_blocks": 1, "num_visual_blocks": 2, "dit_depth": 2,
    "num_attention_heads": 2, "attention_head_dim": 16, "num_key_value_heads": 1, "num_kv_heads": 1, "head_dim": 16,
    "n_heads": 2, "n_kv_heads": 2, "num_heads": 2, "dit_heads": 2, "dim": 32, "hidden_size": 32, "embed_dim": 32,
    "dit_dim": 32, "model_dim": 32, "ff_dim": 64, "ffn_dim": 64, "intermediate_size": 64, "ffn_hidden_size": 64,
    "in_channels": 4, "out_channels": 4, "sample_size": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 4,
    "joint_attention_dim": 32, "cross_attention_dim": 32, "caption_channels": 32, "caption_projection_dim": 32,
    "text_embed_dim": 32, "text_dim": 32, "pooled_projection_dim": 32, "cap_feat_dim": 32, "context_in_dim": 32,
    "time_embed_dim": 32, "freq_dim": 32, "time_dim": 32, "in_text_dim": 32, "in_text_dim2": 32, "dit_text_dim": 32,
    "axes_dims_rope": (4, 6, 6), "rope_axes_dim": (4, 6, 6), "axes_dims": (4, 6, 6), "axes_dim_rope": (4, 6, 6),
    "rope_dim_list": [4, 6, 6], "rope_dim": (4, 6, 6), "max_text_seq_length": 8, "encoder_hidden_size": 32,
    "norm_num_groups": 8, "layers_per_block": 1, "cross_attention_head_dim": 16, "num_cross_attention_heads": 2,
    "condition_dim": 16, "embedding_dim": 32, "pos_embed_max_size": 16,
}  # fmt: skip
"""What a setting of this name becomes in every class that has it and sets it; a class's own row goes before."""

LTX2 = {
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}  # fmt: skip
HUNYUAN_DIT = {"cross_attention_dim_t5": 32, "text_len": 4, "text_len_t5": 8, "pooled_projection_dim": 32}


def unet(down: str, up: str) -> dict[str, Any]:
    """A UNet of two levels, the first with attention."""
    blocks = {"down_block_types": (f"CrossAttn{down}", down), "up_block_types": (up, f"CrossAttn{up}")}
    return {"block_out_channels": (16, 32), **blocks}


def control_unet(kind: str = "2D") -> dict[str, Any]:
    """The first half of such a UNet."""
    blocks = {"down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"), "attention_head_dim": 2}
    return {"block_out_channels": (16, 32), "conditioning_embedding_out_channels": (8, 8, 8, 8), **blocks}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {"in_channels": 24, "audio_acoustic_hidden_dim": 8},
    "AudioLDM2UNet2DConditionModel": {**unet("DownBlock2D", "UpBlock2D"), "attention_head_dim": 8},
    "BriaFibo2Transformer2DModel": {
        "injection_layer_ids": (1,), "cap_feat_dim": 32, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
        "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 64, "perceiver_num_layers": 1,
    },
    "BriaFiboTransformer2DModel": {"text_encoder_dim": 32},
    "ControlNetModel": control_unet(),
    "ControlNetUnionModel": {**control_unet(), "addition_time_embed_dim": 8, "num_trans_channel": 16,
                             "num_proj_channel": 16, "num_trans_head": 2},
    "Cosmos3OmniTransformer": {"vocab_size": 64, "latent_channel": 4, "patch_latent_dim": 16},
    "CosmosControlNetModel": {"in_channels": 20, "latent_channels": 6, "model_channels": 32, "n_controlnet_blocks": 2,
                              "adaln_lora_dim": 8, "crossattn_proj_in_channels": 32,
                              "encoder_hidden_states_channels": 32},
    "CosmosTransformer3DModel": {"adaln_lora_dim": 8, "max_size": (4, 8, 8)},
    "DreamLiteTransformer2DModel": {"in_channels": 32, "cross_attention_dim": 32},
    "DreamLiteUNetModel": {
        "block_out_channels": (16, 32, 32), "attention_head_dim": 8, "cross_attention_dim": 32, "ff_mult": 2,
    },
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "GlmImageTransformer2DModel": {"prior_vq_quantizer_codebook_size": 64},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "caption_channels": [32, 32], "llama_layers": [0, 1, 1, 0], "axes_dims_rope": (8, 4, 4),
        "text_emb_dim": 32, "max_resolution": (16, 16),
    },
    "HunyuanDiT2DControlNetModel": {"in_channels": 4, "patch_size": 2, "transformer_num_layers": 4, **HUNYUAN_DIT},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "num_layers": 4, **HUNYUAN_DIT},
    "HunyuanImageTransformer2DModel": {"rope_axes_dim": (8, 8)},
    "HunyuanVideo15Transformer3DModel": {"text_embed_2_dim": 32, "image_embed_dim": 32},
    "HunyuanVideoFramepackTransformer3DModel": {
        "has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True,
    },
    "I2VGenXLUNet": {**unet("DownBlock3D", "UpBlock3D"), "attention_head_dim": 8},
    "Ideogram4Transformer2DModel": {"mrope_section": (4, 2, 2), "llm_features_dim": 32, "adaln_dim": 16},
    "Kandinsky3UNet": {
        "block_out_channels": (16, 32, 32, 32), "groups": 8, "time_embedding_dim": 64, "encoder_hid_dim": 32,
        "layers_per_block": 2, "attention_head_dim": 8,
    },
    "Krea2Transformer2DModel": {
        "text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
        "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
    },
    "LatteTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "caption_channels": 32, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "video_length": 4, "cross_attention_dim": 32, "num_embeds_ada_norm": 1000,
    },
    "LTX2VideoTransformer3DModel": LTX2,
    "LuminaNextDiT2DModel": {"num_kv_heads": 2, "multiple_of": 16},
    "MiniMaxH3Transformer3DModel": {
        "audio_in_channels": 4, "time_embed_hidden_dim": 32, "rope_freq_dim": 2,
    },
    "MiniMaxMusic3Transformer1DModel": {"ff_inner_dim": 64, "rotary_dim": 8, "fourier_embedding_dim": 16},
    "NucleusMoEImageTransformer2DModel": {
        "num_layers": 5, "num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": 2.0,
    },
    "OmniGenTransformer2DModel": {
        "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "time_step_dim": 16,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    },
    "PRXTransformer2DModel": {"axes_dim": [8, 8]},
    "PixArtTransformer2DModel": {"caption_channels": 32},
    "SanaWMLTX2RefinerTransformer3DModel": LTX2,
    "SanaWMTransformer3DModel": {"linear_head_dim": 16, "chunk_plucker_post_attn_blocks": 0, "num_layers": 4},
    "SparseControlNetModel": {**control_unet("Motion"), "motion_num_attention_heads": 2},
    "StableAudio3DiTModel": {"io_channels": 4, "cond_token_dim": 32, "global_cond_dim": 32, "local_add_cond_dim": 5,
                             "num_memory_tokens": 4},
    "StableAudioDiTModel": {
        "num_key_value_attention_heads": 1, "time_proj_dim": 16, "global_states_input_dim": 32,
        "cross_attention_input_dim": 32,
    },
    "StableCascadeUNet": {
        "block_out_channels": (16, 32), "num_attention_heads": (2, 2), "conditioning_dim": 32,
        "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": 32,
        "clip_text_in_channels": 32, "clip_image_in_channels": 32, "switch_level": (False,),
    },
    "T5FilmDecoder": {"input_dims": 8, "targets_length": 16, "d_model": 32, "d_kv": 16, "d_ff": 64},
    "Transformer2DModel": {"in_channels": 32, "cross_attention_dim": 32},
    "TransformerTemporalModel": {"in_channels": 32, "cross_attention_dim": 32},
    "UNet1DModel": {"extra_in_channels": 64, "block_out_channels": (32, 32, 64)},
    "UNet2DConditionModel": {**unet("DownBlock2D", "UpBlock2D"), "attention_head_dim": 2},
    "UNet2DModel": {
        "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    },
    "UNet3DConditionModel": {**unet("DownBlock3D", "UpBlock3D"), "attention_head_dim": 8},
    "UNetControlNetXSModel": {
        **unet("DownBlock2D", "UpBlock2D"), "num_attention_heads": 2, "ctrl_block_out_channels": (8, 16),
        "ctrl_num_attention_heads": 2, "ctrl_conditioning_embedding_out_channels": (8, 8),
        "ctrl_max_norm_num_groups": 4,
    },
    "UNetMotionModel": {
        **unet("DownBlockMotion", "UpBlockMotion"), "num_attention_heads": 2, "motion_num_attention_heads": 2,
    },
    "UNetSpatioTemporalConditionModel": {
        **unet("DownBlockSpatioTemporal", "UpBlockSpatioTemporal"), "num_attention_heads": (2, 2), "num_frames": 4,
        "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 48, "in_channels": 8,
        "block_out_channels": (32, 64),
    },
    "UVit2DModel": {
        "cond_embed_dim": 32, "micro_cond_encode_dim": 16, "micro_cond_embed_dim": 80, "vocab_size": 64,
        "codebook_size": 63, "in_channels": 32, "block_out_channels": 32, "num_res_blocks": 1, "block_num_heads": 2,
    },
    "UniDiffuserModel": {
        "text_dim": 32, "clip_img_dim": 32, "num_text_tokens": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "norm_type": "layer_norm", "use_patch_pos_embed": True,
        "ff_final_dropout": True, "pre_layer_norm": False, "activation_fn": "gelu", "block_type": "unidiffuser",
    },
    "WanAnimate2Transformer3DModel": {"in_dim": 12, "text_len": 8, "out_dim": 4},
    "WanAnimateTransformer3DModel": {
        "in_channels": 12, "latent_channels": 4, "image_dim": 32, "added_kv_proj_dim": 32, "motion_encoder_size": 16,
        "motion_style_dim": 16, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    },
    "WanVACETransformer3DModel": {"vace_layers": [0, 1], "vace_in_channels": 8},
    "ZImageControlNetModel": {
        "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4,
        "add_control_noise_refiner": "control_layers",
    },
}  # fmt: skip


def names() -> list[str]:
    """Denoisers of the installed diffusers."""
    found = [n for n in dir(diffusers) if DENOISER.search(n) and not PARTS.search(n) and _is_model(n)]
    return sorted(found)


def build(name: str) -> nn.Module:
    """The class with a tiny configuration and random weights, the same in every call."""
    cls = getattr(diffusers, name)
    own = CONFIGURATIONS.get(name, {})
    given = inspect.signature(cls.__init__).parameters
    small = {key: value for key, value in SMALL.items() if key in given and given[key].default is not None}
    torch.manual_seed(0)
    model = cls(**{**small, **own})
    if name == "ZImageControlNetModel":  # it shares the embeddings of the transformer that it steers
        model = cls.from_transformer(model, build("ZImageTransformer2DModel"))
    return model  # type: ignore[no-any-return]


def _is_model(name: str) -> bool:
    try:
        found = getattr(diffusers, name)
    except (AttributeError, RuntimeError, ImportError):
        return False
    return inspect.isclass(found) and issubclass(found, diffusers.ModelMixin)
