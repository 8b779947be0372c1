"""What single classes for video ask for beside, or otherwise than, the rules by a parameter's name."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from mmpeft.diffusion.inputs.facts import FRAMES, ROWS, SIDE, Denoiser, rotation
from mmpeft.diffusion.inputs.rules import IMAGE_SCALE, text, timestep
from mmpeft.types import AnyModule, Argument, Kwargs

Values = Kwargs


def _cogvideox(d: Denoiser) -> Values:
    rotary = d.get("use_rotary_positional_embeddings")
    frames = d.frames // d.patch[0]
    width = d.size("attention_head_dim", default=0)
    return {
        "image_rotary_emb": rotation(frames * SIDE * SIDE, width) if rotary else None,
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
    embed: AnyModule = d.model.patch_embed
    widest = embed.proj.in_features // (d.patch[0] * d.patch[1] * d.patch[2])
    rest = widest - channels - int(bool(d.get("concat_padding_mask")))
    width = d.size("crossattn_proj_in_channels" if d.get("use_crossattn_projection") else "text_embed_dim", default=0)
    prompt: Argument = d.text(width)
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


def _framepack(d: Denoiser) -> Values:
    values: Values = {"indices_latents": torch.arange(d.frames)}
    if d.get("has_clean_x_embedder"):
        for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 4)):
            values[f"latents_{name}"] = d.noise(ROWS, d.channels, frames, 2 * d.side, 2 * d.side)
            values[f"indices_latents_{name}"] = torch.arange(frames)
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
        "hidden_states": d.noise(ROWS, d.frames, side, side, 2 * d.channels + 1),  # noise, the small video, a mask
        "timestep": timestep(d).to(d.dtype),
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


def _wan_animate(d: Denoiser) -> Values:
    pose = d.size("latent_channels", default=16)
    side = d.size("motion_encoder_size", default=512)
    return {
        "pose_hidden_states": d.noise(ROWS, pose, d.frames - 1, d.side, d.side),
        "face_pixel_values": d.noise(ROWS, 3, 4 * (d.frames - 2) + 1, side, side),
    }


def _anyflow(d: Denoiser) -> Values:
    later = torch.tensor([[500.0], [300.0]]).expand(ROWS, d.frames).contiguous()
    values: Values = {"timestep": later, "r_timestep": later / 2}
    if "chunk_partition" in d.parameters:
        values["chunk_partition"] = [1] * d.frames
    return values


def _i2vgen(d: Denoiser) -> Values:
    width = d.size("cross_attention_dim", default=0)
    return {"image_latents": d.latent(), "image_embeddings": d.noise(ROWS, 1, width)}


def _motion(d: Denoiser) -> Values:
    features = text(d)
    return {"encoder_hidden_states": None if features is None else features.repeat_interleave(d.frames, 0)}


def _sparse_control(d: Denoiser) -> Values:
    scale = 1 if d.config.get("use_simplified_condition_embedding") else IMAGE_SCALE
    shape = (d.frames, scale * d.side, scale * d.side)
    mask = torch.ones(ROWS, 1, *shape, dtype=d.dtype) if d.get("concat_conditioning_mask") else None
    condition = d.noise(ROWS, d.size("conditioning_channels", default=4), *shape)
    return {**_motion(d), "controlnet_cond": condition, "conditioning_mask": mask}


def _spatio_temporal(d: Denoiser) -> Values:
    facts = d.size("projection_class_embeddings_input_dim", default=0) // d.size("addition_time_embed_dim", default=1)
    return {
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * ROWS)[:, :facts],
        "encoder_hidden_states": d.noise(ROWS, 1, d.size("cross_attention_dim", default=0)),
    }


def _minimax(d: Denoiser) -> Values:
    text_rows, video, audio = d.text_length, d.tokens, 6
    length = text_rows + video + audio
    tags = torch.tensor([0] * text_rows + [1] * video + [2] * audio)
    t, h, w = d.patch
    return {
        "hidden_states": d.noise(ROWS, video, d.channels * t * h * w),
        "audio_hidden_states": d.noise(ROWS, audio, d.size("audio_in_channels", default=0)),
        "timestep": torch.tensor([0.0, 500.0]),
        "timestep_indices": (tags > 0).long(),
        "token_tags": tags,
        "position_ids": torch.arange(length)[:, None].expand(-1, 3).contiguous(),
        "text_indices": torch.arange(text_rows),
        "video_indices": torch.arange(text_rows, text_rows + video),
        "audio_indices": torch.arange(text_rows + video, length),
    }


def _sana_refiner(d: Denoiser) -> Values:
    width = d.size("num_attention_heads", default=1) * d.size("attention_head_dim", default=1)
    cos, sin = rotation(d.tokens, width)
    rotary = (cos.expand(ROWS, -1, -1), sin.expand(ROWS, -1, -1))
    return {"video_rotary_emb": rotary, "timestep": timestep(d)[:, None]}


def _wan_animate_2(d: Denoiser) -> Values:
    home = sys.modules[next(cls.__module__ for cls in type(d.model).__mro__ if cls.__name__ in d.names)]
    condition = d.size("out_dim", default=16)  # what conditions is as wide as the rest of the input
    size = (FRAMES, d.side, d.side)
    grid = torch.tensor([[FRAMES, SIDE, SIDE]])
    return {
        "hidden_states": [d.noise(condition, *size)],
        "condition_latents": [d.noise(d.size("in_dim", default=36) - condition, *size)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [d.noise(8, d.size("text_dim", default=0))],
        "encoder_hidden_states_image": d.noise(1, 257, 1280) if d.get("use_img_emb") else None,
        "kv_cache": home.WanAnimate2KVCache(d.size("num_layers", default=0)),
        "kv_cache_mode": "extract",  # the pass over the reference image, whose keys the other pass would ask for
        "seq_len": FRAMES * SIDE * SIDE,
        "offset_grid_sizes": grid,
    }


def _sana_world(d: Denoiser) -> Values:
    return {
        "timestep": timestep(d)[:, None, None].expand(ROWS, 1, d.frames),
        "encoder_hidden_states": d.noise(ROWS, 1, d.text_length, d.size("caption_channels", default=0)),
        "mask": torch.ones(ROWS, d.text_length),
    }


def _vace(d: Denoiser) -> Values:
    channels = d.size("vace_in_channels", default=0)
    return {"control_hidden_states": d.latent(channels)}


def _cosmos3(d: Denoiser) -> Values:
    words, patch = d.text_length, d.size("latent_patch_size", default=1)  # one packed sequence: text, then video
    grid = (FRAMES, SIDE, SIDE)
    video = torch.arange(words, words + FRAMES * SIDE * SIDE)
    length = words + len(video)
    latent = d.noise(1, d.size("latent_channel", default=0), FRAMES, SIDE * patch, SIDE * patch)
    return {
        "input_ids": torch.arange(words) % d.size("vocab_size", default=1),
        "text_indexes": torch.arange(words),
        "position_ids": torch.arange(length).expand(3, -1).contiguous(),
        "und_len": words,
        "sequence_length": length,
        "vision_tokens": [latent],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((len(video),), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
    }


CASES: dict[str, Callable[[Denoiser], Values]] = {
    "AnyFlowFARTransformer3DModel": _anyflow,
    "AnyFlowTransformer3DModel": _anyflow,
    "CogVideoXTransformer3DModel": _cogvideox,
    "ConsisIDTransformer3DModel": _consisid,
    "Cosmos3OmniTransformer": _cosmos3,
    "CosmosControlNetModel": _cosmos_control,
    "CosmosTransformer3DModel": _cosmos,
    "HunyuanVideo15Transformer3DModel": _hunyuan_15,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "I2VGenXLUNet": _i2vgen,
    "JoyImageEditPlusTransformer3DModel": _joy_plus,
    "Kandinsky5Transformer3DModel": _kandinsky,
    "Kandinsky6SRTransformer3DModel": _kandinsky_sr,
    "Kandinsky6Transformer3DModel": _kandinsky,
    "LTX2VideoTransformer3DModel": _ltx,
    "LTXVideoTransformer3DModel": _ltx,
    "LatteTransformer3DModel": lambda d: {"encoder_attention_mask": None},
    "MiniMaxH3Transformer3DModel": _minimax,
    "SanaWMLTX2RefinerTransformer3DModel": _sana_refiner,
    "SanaWMTransformer3DModel": _sana_world,
    "SparseControlNetModel": _sparse_control,
    "UNetMotionModel": _motion,
    "UNetSpatioTemporalConditionModel": _spatio_temporal,
    "WanAnimate2Transformer3DModel": _wan_animate_2,
    "WanAnimateTransformer3DModel": _wan_animate,
    "WanVACETransformer3DModel": _vace,
}
