"""What single classes of diffusers ask for beside, or otherwise than, the rules by a parameter's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmpeft.diffusion.input_facts import FRAMES, ROWS, SIDE, Denoiser
from mmpeft.diffusion.input_rules import timestep

Values = dict[str, Any]


def _rotation(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions [L, D]: any angle will do."""
    angle = torch.arange(length)[:, None] * torch.linspace(1.0, 0.1, width)[None]
    return angle.cos(), angle.sin()


def _patches(d: Denoiser) -> int:
    return SIDE * SIDE * (FRAMES if d.as_video else 1)


def _cogvideox(d: Denoiser) -> Values:
    rotary = d.get("use_rotary_positional_embeddings")
    frames = d.frames // d.patch[0]
    width = d.size("attention_head_dim", default=0)
    return {
        "image_rotary_emb": _rotation(frames * SIDE * SIDE, width) if rotary else None,
        "ofs": torch.tensor([2.0]) if d.get("ofs_embed_dim") else None,
    }


def _consisid(d: Denoiser) -> Values:
    if not d.get("is_train_face"):
        return _cogvideox(d)
    layers = d.size("LFE_num_scale", default=5)
    faces = [d.noise(ROWS, 577, d.size("LFE_vit_dim", default=0)) for _ in range(layers)]
    return {**_cogvideox(d), "id_cond": d.noise(ROWS, d.size("LFE_id_dim", default=0)), "id_vit_hidden": faces}


def _cosmos(d: Denoiser) -> Values:
    condition = torch.ones(ROWS, 1, d.frames, d.side, d.side, dtype=d.dtype)
    channels = d.channels
    # the configuration counts the mask of conditioned frames as a channel where video is continued
    widest = d.model.patch_embed.proj.in_features // (d.patch[0] * d.patch[1] * d.patch[2])
    rest = widest - channels - int(bool(d.get("concat_padding_mask")))
    width = d.size("crossattn_proj_in_channels" if d.get("use_crossattn_projection") else "text_embed_dim", default=0)
    prompt: Any = d.text(width)
    if d.get("img_context_dim_in"):
        prompt = (prompt, d.noise(ROWS, 4, d.size("img_context_dim_in", default=0)))
    return {
        "encoder_hidden_states": prompt,
        "padding_mask": torch.zeros(1, 1, d.side, d.side, dtype=d.dtype),
        "condition_mask": condition if rest == 1 else None,
    }


def _cosmos_control(d: Denoiser) -> Values:
    channels = d.size("latent_channels", default=0) - 2  # beside the two masks
    shape = (ROWS, channels, d.frames, d.side, d.side)
    width = d.size("crossattn_proj_in_channels" if d.get("use_crossattn_projection") else "text_embed_dim", default=0)
    return {
        "controls_latents": d.noise(*shape),
        "latents": d.noise(*shape),
        "encoder_hidden_states": d.text(width),
        "condition_mask": torch.ones(ROWS, 1, d.frames, d.side, d.side, dtype=d.dtype),
        "padding_mask": torch.zeros(1, 1, d.side, d.side, dtype=d.dtype),
    }


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
        "image_rotary_emb": _rotation(SIDE * SIDE, cls_width),
        "controlnet_cond": d.latent() if "controlnet_cond" in d.parameters else None,
    }


def _framepack(d: Denoiser) -> Values:
    step = torch.arange(d.frames).expand(ROWS, -1)
    values: Values = {"indices_latents": step}
    if d.get("has_clean_x_embedder"):
        for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 4)):
            values[f"latents_{name}"] = d.noise(ROWS, d.channels, frames, 2 * d.side, 2 * d.side)
            values[f"indices_latents_{name}"] = torch.arange(frames).expand(ROWS, -1)
        values["hidden_states"] = d.noise(ROWS, d.channels, d.frames, 2 * d.side, 2 * d.side)
    return values


def _hunyuan_15(d: Denoiser) -> Values:
    return {"image_embeds": d.noise(ROWS, 4, d.size("image_embed_dim", default=0))}


def _kandinsky(d: Denoiser) -> Values:
    channels = d.channels
    if d.get("visual_cond"):  # the latent, a second one that conditions, and a mask
        channels = 2 * channels + 1
    shape = (ROWS, d.frames, d.side, d.side, channels)
    visual = tuple(torch.arange(n) for n in (d.frames, SIDE, SIDE))
    values: Values = {"hidden_states": d.noise(*shape), "timestep": timestep(d).to(d.dtype)}
    if "text_rope_pos" in d.parameters:
        values |= {"visual_rope_pos": visual, "text_rope_pos": torch.arange(d.text_length)}
    if "audio_hidden_states" in d.parameters:
        values["audio_hidden_states"] = d.noise(ROWS, 8, d.size("in_audio_dim", default=0))
        values["encoder_attention_mask"] = None
    return values


def _kandinsky_sr(d: Denoiser) -> Values:
    side = 8 * d.patch[1]  # its sparse attention works on neighbourhoods of 8 x 8
    return {
        "hidden_states": d.noise(ROWS, d.frames, side, side, d.channels),
        "timestep": timestep(d).to(d.dtype),
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


def _joy_plus(d: Denoiser) -> Values:
    return {
        "hidden_states": d.noise(ROWS, d.tokens, d.channels, *d.patch),
        "shape_list": [[(FRAMES, SIDE, SIDE)]] * ROWS,
    }


def _ltx(d: Denoiser) -> Values:
    values: Values = {"num_frames": FRAMES, "height": SIDE, "width": SIDE, "timestep": timestep(d)[:, None]}
    if "audio_hidden_states" not in d.parameters:
        return values
    prompts = d.get("use_prompt_embeddings")
    width = d.size("caption_channels", default=0) if prompts else d.size("cross_attention_dim", default=0)
    audio = d.size("caption_channels", default=0) if prompts else d.size("audio_cross_attention_dim", default=0)
    return {
        **values,
        "encoder_hidden_states": d.text(width),
        "audio_encoder_hidden_states": d.text(audio),
        "audio_hidden_states": d.noise(ROWS, 6, d.size("audio_in_channels", default=0)),
        "audio_num_frames": 6,
        "sigma": torch.tensor([0.1, 0.9]),
        "encoder_attention_mask": None,
    }


def _lumina(d: Denoiser) -> Values:
    width = d.size("hidden_size", default=0) // d.size("num_attention_heads", default=1)
    angle = torch.outer(torch.arange(384.0), torch.linspace(1.0, 0.1, width // 2))
    grid = torch.polar(torch.ones_like(angle), angle)[:SIDE, None, :].expand(SIDE, SIDE, -1).contiguous()
    return {
        "encoder_mask": torch.ones(ROWS, d.text_length, dtype=torch.long),
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


def _stable_audio(d: Denoiser) -> Values:
    width = d.size("global_states_input_dim", default=0)
    length = d.line + 1  # the global condition is a position of its own
    return {
        "global_hidden_states": d.noise(ROWS, 1, width),
        "rotary_embedding": _rotation(length, d.size("attention_head_dim", default=0) // 2),
        "encoder_attention_mask": None,
    }


def _stable_audio_3(d: Denoiser) -> Values:
    local = d.size("local_add_cond_dim", default=0)
    return {
        "timestep": torch.tensor([0.1, 0.9]),
        "global_hidden_states": d.noise(ROWS, d.size("global_cond_dim", default=0)),
        "local_add_cond": d.noise(ROWS, local, d.line) if local else None,
    }


def _film(d: Denoiser) -> Values:
    width = d.size("d_model", default=0)
    length = d.size("targets_length", default=0)
    return {
        "encodings_and_masks": [(d.text(width), torch.ones(ROWS, d.text_length))],
        "decoder_input_tokens": d.noise(ROWS, length, d.size("input_dims", default=0)),
        "decoder_noise_time": torch.tensor([0.1, 0.9]),
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
        return {"hidden_states": torch.arange(ROWS * length).view(ROWS, length) % d.size("num_vector_embeds", default=1)}
    channels = d.size("in_channels", default=0)
    side = d.size("sample_size", default=SIDE) if d.get("patch_size") else SIDE
    return {"hidden_states": d.noise(ROWS, channels, side, side)}


def _z_image(d: Denoiser) -> Values:
    frames = d.patch[0]
    width = d.size("cap_feat_dim", default=2560)
    latents = [d.noise(d.channels, frames, d.side, d.side) for _ in range(ROWS)]
    return {
        "x": latents,
        "t": torch.tensor([0.1, 0.9]),
        "cap_feats": [d.noise(8, width) for _ in range(ROWS)],
        "patch_size": d.patch[1],
        "f_patch_size": frames,
        "timestep": None,
    }


def _wan_animate(d: Denoiser) -> Values:
    pose = d.size("latent_channels", default=16)
    side = d.size("motion_encoder_size", default=512)
    return {
        "pose_hidden_states": d.noise(ROWS, pose, d.frames - 1, d.side, d.side),
        "face_pixel_values": d.noise(ROWS, 3, 4 * (d.frames - 2) + 1, side, side),
    }


CASES: dict[str, Callable[[Denoiser], Values]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "ConsisIDTransformer3DModel": _consisid,
    "CosmosTransformer3DModel": _cosmos,
    "CosmosControlNetModel": _cosmos_control,
    "HiDreamImageTransformer2DModel": _hidream,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "HunyuanDiT2DControlNetModel": _hunyuan_dit,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "HunyuanVideo15Transformer3DModel": _hunyuan_15,
    "Kandinsky5Transformer3DModel": _kandinsky,
    "Kandinsky6Transformer3DModel": _kandinsky,
    "Kandinsky6SRTransformer3DModel": _kandinsky_sr,
    "Krea2Transformer2DModel": _krea,
    "Ideogram4Transformer2DModel": _ideogram,
    "JoyImageEditPlusTransformer3DModel": _joy_plus,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx,
    "LuminaNextDiT2DModel": _lumina,
    "PriorTransformer": _prior,
    "StableCascadeUNet": _cascade,
    "StableAudioDiTModel": _stable_audio,
    "StableAudio3DiTModel": _stable_audio_3,
    "T5FilmDecoder": _film,
    "UVit2DModel": _uvit,
    "Transformer2DModel": _plain_transformer,
    "ZImageTransformer2DModel": _z_image,
    "WanAnimateTransformer3DModel": _wan_animate,
}
