"""How the numbers of transformers configs are called, and how small each becomes."""

from __future__ import annotations

import re

LAYERS, HEADS, KEY_VALUE_HEADS, EXPERTS = 4, 4, 2, 4
POSITIONS = 1024

LAYER_COUNTS = re.compile(
    r"^(n|num|encoder|decoder|num_hidden|num_encoder|num_decoder|encoder_num(_hidden)?|decoder_num(_hidden)?|"
    r"num_encoder_hidden|num_decoder_hidden|text_encoder_num|vision|num_sparse_(en|de)coder)_layers?$|^n_layers?$|^depth$|^layers$"
    r"|^num_hidden_layers$|^num_\w+_layers$|^[lxr]_layers$|_layers$|^num_(\w+_)?blocks$|^depth$|_depth$"
)
HEAD_COUNTS = re.compile(r"(^|_)n?_?heads?(_per_stage|_per_layer)?$|^num_heads$|_attention_heads?$")
HEAD_WIDTH = re.compile(r"head_(dim|size|width)$|^d_kv$|^dim_head$|attention_head_size$|^kv_channels$|headdim$|d_head$")
EXPERT_COUNTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$")
CHOSEN_COUNTS = re.compile(
    r"experts_per_tok(en)?$|^moe_top_?k$|^num_selected_experts$|^moe_k$|^top_?k_experts$|^num_experts_per_token"
)
VOCABULARIES = re.compile(r"(vocab_size(_per_layer_input)?|vocabulary_size|_vocab|num_embeddings|bigram_vocab_size)$")
TOKENS = re.compile(r"(token_ids?|token_index|_token|bos_id|eos_id|pad_id|_id|eos_ids?|start_id|end_id|_index)$")
WIDTH = re.compile(
    r"(hidden_(size|dim|sizes|channels|dimension|size_global)|(^|_)d_model|n_embd|embed_dims?|_dims?|_size|_sizes|d_ff|n_inner|ffn|width|"
    r"channels?|filters|(^|_)dim|units|mlp_dim|lora_rank|d_inner|d_latents|embedding_rank|_width|planes|_channels_?\w*|_dims_?\w*)$"
)
NO_WIDTH = re.compile(
    r"(vocab|image|img|patch|kernel|window|chunk|block|batch|codebook_size|type_|max_|buffer|context|num_channels|"
    r"input_feat|state_size|fft|hop|sample|queue|cache|grid|crop|frame|memory_size|positions|tubelet|merge|pool|"
    r"group|roi|rotary|^input_size|model_in|^in_channels|out_channels|audio_channels|tile|n_ctx|mel|expan|interp|reduction|"
    r"conv_size|d_conv|rope_dim|mrope|stride|train_size|qk_rope|mask_size|^input_dim|step_dim|segment|feature_size|spatial|temporal|canvas|pos_embed_size|posemb)"
)
POSITION_COUNTS = re.compile(
    r"(max_(\w+_)?positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length|max_seqlen)$"
)
QUERY_COUNTS = re.compile(
    r"^(num_queries|num_query_tokens|two_stage_num_proposals|num_object_queries|num_detection_tokens|n_queries)$"
)
PLACES = re.compile(
    r"(ind(ic|ex)e?s|index(es)?|_ids|_layers|_layer|_layer_ids|_blocks|_idx|layers|_features|_at|proj_layers)$"
)
FIXED = {
    "sliding_window": 8,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "index_topk": 8,
    "num_nextn_predict_layers": 0,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "expert_layer_period": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_offset": 1,
    "full_attention_interval": 2,
    "num_codevectors_per_group": 20,
    "max_source_positions": 128,
    "rotary_dim": 8,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "num_kv_shared_layers": 2,
    "mm_tokens_per_image": 4,
    "latent_query_num": 4,
    "use_mamba_kernels": False,
}
MORE_WIDTHS = ("upsample_groups", "bottleneck_features", "downsample_channels")  # widths under other names
WHERE_NONE = {"num_key_value_heads": KEY_VALUE_HEADS, "vocab_size": 64, "num_experts_per_tok": 2, "head_dim": 16}
WHERE_NONE |= {"image_token_id": 5, "video_token_id": 6, "audio_token_id": 7}  # whatever a tower's features stand for
WIDTH_OF_TEXT = ("out_hidden_size", "text_hidden_size", "llm_hidden_size")
# Heads, their width, and what times the hidden width they make.
SCANS = (
    ("num_heads", "head_dim", "expand"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
)
