"""What single classes for images ask for beside, or otherwise than, the rules by a parameter's name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmpeft.diffusion.inputs.facts import FRAMES, ROWS, SIDE, Denoiser, rotation
from mmpeft.diffusion.inputs.rules import control, timestep
from mmpeft.types import AnyModule, Kwargs

Values = Kwargs


def _hidream(d: Denoiser) -> Values:
    t5, llama = d.config["caption_channels"][0], d.config["caption_channels"][-1]
    layers = max(d.config["llama_layers"]) + 1
    states = d.noise(layers, ROWS, d.text_length, llama)
    return {"encoder_hidden_states_t5": d.text(t5), "encoder_hidden_states_llama3": states}


def _hunyuan_dit(d: Denoiser) -> Values:
    clip, t5 = d.size("text_len", default=77), d.size("text_len_t5", default=256)
    cls_width = d.size("attention_head_dim", default=0)
    return {
        "timestep": timestep(d).to(d.dtype),
        "encoder_hidden_states": d.text(d.size("cross_attention_dim", default=0), clip),
        "text_embedding_mask": torch.ones(ROWS, clip),
        "encoder_hidden_states_t5": d.text(d.size("cross_attention_dim_t5", default=0), t5),
        "text_embedding_mask_t5": torch.ones(ROWS, t5),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]] * ROWS),
        "style": torch.zeros(ROWS, dtype=torch.long),
        "image_rotary_emb": rotation(SIDE * SIDE, cls_width),
        "controlnet_cond": d.latent() if "controlnet_cond" in d.parameters else None,
    }


def _krea(d: Denoiser) -> Values:
    layers = d.size("num_text_layers", default=1)
    return {
        "encoder_hidden_states": d.noise(ROWS, d.text_length, layers, d.size("text_hidden_dim", default=0)),
        "position_ids": torch.zeros(d.text_length + d.tokens, 3),
    }


def _ideogram(d: Denoiser) -> Values:
    length = d.text_length + d.tokens
    indicator = torch.full((ROWS, length), 2)  # an image's tokens; 3 are those of the language model
    indicator[:, : d.text_length] = 3
    return {
        "hidden_states": d.noise(ROWS, length, d.channels),
        "encoder_hidden_states": d.noise(ROWS, length, d.size("llm_features_dim", default=0)),
        "timestep": torch.tensor([0.1, 0.9]),
        "position_ids": torch.arange(length)[None, :, None].expand(ROWS, length, 3).clone(),
        "segment_ids": torch.ones(ROWS, length, dtype=torch.long),
        "indicator": indicator,
    }


def _lumina(d: Denoiser) -> Values:
    width = d.size("hidden_size", default=0) // d.size("num_attention_heads", default=1)
    angle = torch.outer(torch.arange(384.0), torch.linspace(1.0, 0.1, width // 2))
    grid = torch.polar(torch.ones_like(angle), angle)[:SIDE, None, :].expand(SIDE, SIDE, -1).contiguous()
    return {
        "encoder_mask": torch.ones(ROWS, d.text_length, dtype=torch.long),
        "cross_attention_kwargs": {},
        "image_rotary_emb": grid,
        "timestep": torch.tensor([0.1, 0.9]),
    }


def _prior(d: Denoiser) -> Values:
    width = d.size("embedding_dim", default=0)
    length = d.size("num_embeddings", default=77)
    projected = d.size("embedding_proj_dim", "embedding_dim", default=0)
    return {
        "hidden_states": d.noise(ROWS, width),
        "proj_embedding": d.noise(ROWS, projected),
        "encoder_hidden_states": d.text(width, length) if d.get("encoder_hid_proj_type") else None,
    }


def _cascade(d: Denoiser) -> Values:
    pooled = d.size("clip_text_pooled_in_channels", default=0)
    effnet = d.size("effnet_in_channels", default=0)
    words, image = d.size("clip_text_in_channels", default=0), d.size("clip_image_in_channels", default=0)
    return {
        "timestep_ratio": torch.tensor([0.1, 0.9]),
        "clip_text_pooled": d.noise(ROWS, 1, pooled) if pooled else None,
        "clip_text": d.text(words) if words else None,
        "clip_img": d.noise(ROWS, 1, image) if image else None,
        "effnet": d.noise(ROWS, effnet, 4, 4) if effnet else None,
    }


def _uvit(d: Denoiser) -> Values:
    ids = torch.arange(ROWS * 64).view(ROWS, 8, 8) % d.size("codebook_size", default=1)
    return {
        "input_ids": ids,
        "pooled_text_emb": d.noise(ROWS, d.size("cond_embed_dim", default=0)),
        "micro_conds": torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]] * ROWS),
    }


def _plain_transformer(d: Denoiser) -> Values:
    if d.get("num_vector_embeds"):
        length = d.size("sample_size", default=1) ** 2
        return {
            "hidden_states": torch.arange(ROWS * length).view(ROWS, length) % d.size("num_vector_embeds", default=1)
        }
    channels = d.size("in_channels", default=0)
    side = d.size("sample_size", default=SIDE) if d.get("patch_size") else SIDE
    return {"hidden_states": d.noise(ROWS, channels, side, side)}


def _z_image(d: Denoiser) -> Values:
    frames, rows, columns = d.patch
    model: AnyModule = d.model  # its ControlNet has these modules from a transformer, and no setting of their widths
    channels = next(iter(model.all_x_embedder.values())).in_features // (frames * rows * columns)
    width = model.cap_embedder[-1].in_features
    return {
        "x": [d.noise(channels, frames, d.side, d.side) for _ in range(ROWS)],
        "t": torch.tensor([0.1, 0.9]),
        "cap_feats": [d.noise(8, width) for _ in range(ROWS)],
        "patch_size": rows,
        "f_patch_size": frames,
    }


def _control_union(d: Denoiser) -> Values:
    kinds = d.size("num_control_type", default=6)
    first = torch.eye(kinds)[:1].repeat(ROWS, 1)
    return {"controlnet_cond": [control(d)], "control_type": first, "control_type_idx": [0]}


def _ernie(d: Denoiser) -> Values:
    return {"text_bth": d.text(d.size("text_in_dim", default=0)), "text_lens": torch.full((ROWS,), d.text_length)}


def _glm(d: Denoiser) -> Values:
    many = d.size("prior_vq_quantizer_codebook_size", default=1)
    return {
        "prior_token_id": torch.arange(ROWS * d.tokens).view(ROWS, d.tokens) % many,
        "prior_token_drop": torch.zeros(ROWS, d.tokens, dtype=torch.bool),
    }


def _fibo(d: Denoiser) -> Values:
    blocks = d.size("num_layers", default=0) + d.size("num_single_layers", default=0)
    return {"text_encoder_layers": [d.text(d.size("text_encoder_dim", default=0)) for _ in range(blocks)]}


def _fibo_2(d: Denoiser) -> Values:
    bundles = 1 + len(d.config["injection_layer_ids"])  # layers of the language model, one bundle a block that reads
    features = d.noise(ROWS, bundles, d.text_length, d.size("cap_feat_dim", default=0))
    return {"encoder_hidden_states": features, "encoder_attention_mask": None, "timestep": torch.tensor([0.1, 0.9])}


def _omnigen(d: Denoiser) -> Values:
    length = d.text_length + 1 + d.tokens  # a token for the time stands between
    return {
        "input_ids": torch.arange(ROWS * d.text_length).view(ROWS, -1) % d.size("vocab_size", default=1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(ROWS, length, length, dtype=torch.long),
        "position_ids": torch.arange(length).expand(ROWS, -1).contiguous(),
    }


def _qwen_21(d: Denoiser) -> Values:
    slots = torch.zeros(ROWS, d.text_length + d.tokens // 4, dtype=torch.bool)  # a slot stands for 2 x 2 patches
    slots[:, d.text_length :] = True
    return {"img_mask": slots}


def _temporal(d: Denoiser) -> Values:
    channels = d.size("in_channels", default=0)
    prompt = d.size("cross_attention_dim", default=0)
    return {
        "hidden_states": d.noise(ROWS * FRAMES, channels, SIDE, SIDE),
        "encoder_hidden_states": d.noise(ROWS * SIDE * SIDE, 8, prompt) if prompt else None,
        "num_frames": FRAMES,
    }


def _unidiffuser(d: Denoiser) -> Values:
    side = d.size("sample_size", default=8)
    return {
        "latent_image_embeds": d.noise(ROWS, d.channels, side, side),
        "image_embeds": d.noise(ROWS, 1, d.size("clip_img_dim", default=0)),
        "prompt_embeds": d.text(d.size("text_dim", default=0)),
        "timestep_img": timestep(d),
        "timestep_text": timestep(d),
        "encoder_hidden_states": None,
    }


def _z_control(d: Denoiser) -> Values:
    values = _z_image(d)
    context = [d.noise(d.size("control_in_dim", default=0), d.patch[0], d.side, d.side) for _ in range(ROWS)]
    return {**values, "control_context": context}


CASES: dict[str, Callable[[Denoiser], Values]] = {
    "BriaFibo2Transformer2DModel": _fibo_2,
    "BriaFiboTransformer2DModel": _fibo,
    "ControlNetUnionModel": _control_union,
    "DreamLiteTransformer2DModel": _plain_transformer,
    "ErnieImageTransformer2DModel": _ernie,
    "GlmImageTransformer2DModel": _glm,
    "HiDreamImageTransformer2DModel": _hidream,
    "HunyuanDiT2DControlNetModel": _hunyuan_dit,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "Ideogram4Transformer2DModel": _ideogram,
    "Krea2Transformer2DModel": _krea,
    "LuminaNextDiT2DModel": _lumina,
    "OmniGenTransformer2DModel": _omnigen,
    "PriorTransformer": _prior,
    "QwenImage21Transformer2DModel": _qwen_21,
    "StableCascadeUNet": _cascade,
    "Transformer2DModel": _plain_transformer,
    "TransformerTemporalModel": _temporal,
    "UVit2DModel": _uvit,
    "UniDiffuserModel": _unidiffuser,
    "ZImageControlNetModel": _z_control,
    "ZImageTransformer2DModel": _z_image,
}
