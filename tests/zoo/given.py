"""What names and relations of a config do not tell: numbers of single types of transformers, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Networks whose widths are written as tables of blocks: they stay as they are.
AS_IS = {
    "align_vision_model", "efficientloftr", "efficientnet", "hgnet_v2", "pp_lcnet", "pp_lcnet_v3", "pp_lcnet_v4",
    "pp_ocrv5_mobile_det", "pp_ocrv5_mobile_rec", "pp_ocrv5_server_det", "pp_ocrv5_server_rec", "pp_ocrv6_small_det",
    "pp_ocrv6_medium_det", "slanet", "superpoint", "textnet", "uvdoc", "uvdoc_backbone", "vitmatte",
    "edgetam_vision_model", "gemma3n_vision", "timm_wrapper", "clap_audio_model", "xlstm",
}  # fmt: skip


def _image_words(count: int) -> dict[str, int]:
    """How Chameleon calls the tokens of a picture: digits as letters."""
    return {"IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in f"{i:03}") + "Z": 9 + i for i in range(count)}


def _times(name: str, factor: float) -> Callable[[dict[str, Any]], int]:
    return lambda new: int(new[name] * factor)


_PERCEPTION = "vit_pe_core_"


def _small_network(new: dict[str, Any]) -> str:
    """The smallest of a family of timm's that stands in a larger model."""
    name = str(new.get("architecture") or "resnet50")
    if name.startswith(_PERCEPTION):
        return "vit_pe_core_tiny_patch16_384"
    return "resnet18" if "features_only" in (new.get("model_args") or {}) else name


def _shallow(new: dict[str, Any]) -> dict[str, Any]:
    """Two blocks of timm's vision transformers, small pictures, maps of four strides each half of the one before."""
    given, name = dict(new.get("model_args") or {}), str(new.get("architecture", ""))
    if name.startswith(_PERCEPTION):
        given |= {"img_size": [64, 64], "ref_feat_shape": [4, 4]}
    if "features_only" in given:
        given["out_indices"] = [1, 2, 3, 4]
    return {**given, "depth": 2} if name.startswith("vit_") else given


def _small_resnet(new: dict[str, Any]) -> str:
    """The smallest of timm's in place of the usual one."""
    name = str(new.get("backbone") or "resnet")
    return "resnet18" if name.startswith("resnet") else name


def _text_width(new: dict[str, Any]) -> int:
    return int(new["text_width"])


def _halving_lcnet() -> dict[str, Any]:
    blocks = [[[3, 96, 96, 1, True]], *([[3, a, b, 2, False]] for a, b in ((96, 96), (96, 192), (192, 384)))]
    return {"model_type": "pp_lcnet_v4", "block_configs": blocks, "out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}


def _writing(reduced: int) -> dict[str, Any]:
    """The neck of a detector of writing: long and short convolutions in a cross."""
    sides = {"long": 7, "mid": 5, "short": 3}
    crossed = {
        f"{name}_{side}ratio": [kernel(n), 1, padding(n)]
        for side, n in sides.items()
        for name, kernel, padding in (
            ("vertical_long_to_small_conv", lambda n: [n, 1], lambda n: [n // 2, 0]),
            ("horizontal_small_to_long_conv", lambda n: [1, n], lambda n: [0, n // 2]),
            ("symmetric_conv_long", lambda n: [n, n], lambda n: [n // 2, n // 2]),
        )
    }
    ends = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    return {
        "intraclass_block_config": {**ends, **crossed},
        "kernel_list": [3, 2, 2],
        "scale_factor_list": [1, 2, 4, 8],
        "neck_out_channels": reduced,
    }


_SMALL_EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 64}

# What the class of a config is first made with.
START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 30,
            "num_kv_shared_layers": 30,
        }
    },
    "omdet-turbo": {
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": "swin_tiny_patch4_window7_224",
            "out_indices": [1, 2, 3],
            "img_size": 64,
            "always_partition": True,
        }
    },
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_tiny_patch16_384",
            "num_classes": 0,
            "model_args": {"embed_dim": 192, "global_pool": ""},
        }
    },
    "pp_ocrv5_mobile_rec": {  # a line of writing loses its height, not its length
        "backbone_config": {
            "model_type": "pp_lcnet_v3",
            "out_features": ["stage5"],
            "block_configs": [
                [[3, 16, 32, 1, False]],
                [[3, 32, 64, 1, False]],
                [[3, 64, 128, [2, 1], False]],
                [[3, 128, 256, [1, 2], False]],
                [[5, 256, 512, [2, 1], True], [5, 512, 512, [2, 1], False]],
            ],
        }
    },
    **{t: {"backbone_config": _halving_lcnet()} for t in ("pp_ocrv6_small_det", "pp_ocrv6_medium_det")},
    "granite_speech": {"projector_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}},
    "granite_speech_plus": {"projector_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}},
    "ovis2": {"hidden_size": 4096},
}

GIVEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 8, "label_length": 4},
    **{t: {"prediction_length": 4} for t in ("informer", "time_series_transformer")},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1, 3]},
    "beit": {"out_indices": [0, 1, 2, 3]},
    "bit": {"num_groups": 8},
    **{t: {"image_token_index": 5} for t in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": 5},
    "bridgetower": {"hidden_size": 128, "num_attention_heads": 4},
    **{f"bridgetower_{t}_model": {"hidden_size": 128} for t in ("text", "vision")},
    "chameleon": {"vocabulary_map": {"<image>": 8, **_image_words(16)}},
    "chameleon_vqgan": {"num_embeddings": 16},
    "cohere_compass_text": {
        "rope_parameters": {
            t: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
            for t in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "emu3": {
        "vocabulary_map": {
            "<image>": 8,
            "<|extra_200|>": 9,
            **{f"<|visual token {i:06}|>": 10 + i for i in range(16)},
        }
    },
    "ernie4_5_vl_moe_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "esm": {"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "gemma4_text": {"global_head_dim": 64},
    "glm5_next_text": {"index_topk": 16},
    "glmasr_encoder": {"intermediate_size": _times("hidden_size", 4)},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {
        "deepstack_layer_map": [(1, 0), (3, 2)],
        "downsample_rate": "1/2",
        "image_grid_pinpoints": [[128, 256]],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    **{t: {"projection_dim": _text_width} for t in ("janus_vision_model",)},
    "janus_vqgan": {"projection_dim": _text_width, "image_token_embed_dim": _text_width},
    "layoutlmv3": {"hidden_size": 192, "coordinate_size": 32, "shape_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lilt": {"hidden_size": 192},
    "longcat_flash": {"head_dim": 8},
    "lw_detr": {"projector_scale_factors": [2.0, 0.5]},
    "minicpmv4_6": {"image_token_id": 5, "video_token_id": 6, "insert_layer_id": 1},
    "minicpmv4_6_vision": {"insert_layer_id": 1},
    "mllama_vision_model": {
        "vision_output_dim": lambda new: new["hidden_size"] * (1 + len(new["intermediate_layers_indices"]))
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "molmo2_adapter": {"vision_feature_layer": [3, 1]},
    "qwen2_vl_vision": {"hidden_size": _text_width},
    "Qwen2VLVisionConfig": {"hidden_size": _text_width},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "sam2_hiera_det_model": {
        "hidden_size": 32,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 2, 2, 2],
        "embed_dim_per_stage": [32, 64, 128, 256],
        "num_attention_heads_per_stage": [1, 2, 4, 4],
        "window_size_per_stage": [4, 2, 2, 2],
        "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [4, 6],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [256, 128, 64, 32],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    **{t: {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]} for t in ("llava_onevision",)},
    "reformer": {"axial_pos_embds_dim": lambda new: [32, new["hidden_size"] - 32]},
    "tvp": {"num_frames": 4},
    "voxtral": {"audio_token_id": 24},
    "zamba": {
        "attention_hidden_size": _times("hidden_size", 2),
        "attention_head_dim": lambda new: 2 * new["hidden_size"] // new["num_attention_heads"],
    },
    "qwen3_asr_encoder": {"output_dim": lambda new: new["text_width"] or new["output_dim"]},
    "shieldgemma2": {"yes_token_index": 20, "no_token_index": 21},
    "step3p5": {"sliding_window": 8},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "timm_backbone": {"backbone": _small_resnet},
    "diffusion_gemma_text": {"num_experts": 4, "moe_intermediate_size": 48, "top_k_experts": 2},
    "vipllava": {"vision_feature_layers": [-1, -2, -3]},
    "voxtral_encoder": {"intermediate_size": _times("hidden_size", 4)},
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(("efficientnet", "align_vision_model"), _SMALL_EFFICIENTNET),
    "align": {"projection_dim": 80},
    "clap_audio_model": {"patch_embeds_hidden_size": 32, "hidden_size": 256, "depths": [2, 1, 1, 1]},
    "xlstm": {
        **dict.fromkeys(("hidden_size", "embedding_dim"), 128),
        **dict.fromkeys(("num_hidden_layers", "num_blocks", "num_heads"), 4),
        "vocab_size": 400,
        "chunk_size": 4,
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": lambda new: new["text_width"] // 4},
    "gemma4_audio": {"subsampling_conv_channels": [128, 32]},
    "llama4_vision_model": {
        "intermediate_size": _times("hidden_size", 4),
        "vision_output_dim": lambda new: new["projector_output_dim"],
    },
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "muse_spark": {"out_hidden_size": lambda new: 4 * new["widths"][1536]},
    "muse_glimmer": {"out_hidden_size": lambda new: 4 * new["widths"][1536]},
    "paddleocr_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    },
    "sam_vision_model": {"num_pos_feats": lambda new: new["output_channels"] // 2},
    "sam_hq_vision_model": {"num_pos_feats": lambda new: new["output_channels"] // 2},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "emu3_vqgan": {"codebook_size": 16, "base_channels": 32, "hidden_size": 128},
    "timm_wrapper": {"model_args": _shallow, "architecture": _small_network},
    "apertus1p5": {"image_token_offset": 200, "audio_token_offset": 264},
    "clvp_encoder": {"vocab_size": 512, "num_attention_heads": 2},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": lambda new: [64, new["widths"].get(4096, 128)]},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size": 128,
        "vocab_size": 512,
        "vocab_size_per_layer_input": 256,
    },
    "gemma3n_vision": {"vocab_offset": 256, "model_args": {"channel_multiplier": 0.125}},
    "muse_glimmer_assistant": {"sliding_window": 64},
    "depth_pro": {"patch_size": 56, "intermediate_hook_ids": [3, 1]},
    "neucodec": {"num_key_value_heads": 4, "quantization_dim": _times("hidden_size", 2)},
    "omdet-turbo": {"encoder_in_channels": [192, 384, 768], "encoder_projection_indices": [2]},
    "pp_doclayout_v2": {"class_thresholds": [0.0, 0.0], "class_order": [0, 1]},
    **{t: _writing(64) for t in ("pp_ocrv5_server_det", "pp_ocrv6_medium_det")},
    "pp_ocrv6_small_det": {"layer_list_out_channels": [96, 96, 192, 384]},
    "neomme": {"head_dim": 32},
    "edgetam_vision_model": {
        "backbone_channel_list": [512, 256, 128, 64],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "gemma3n_audio": {"sscp_conv_channel_size": [128, 32], "vocab_offset": 384},
}
