"""What each parameter of a denoiser's `forward` is given, by its name; None where the configuration does not ask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmpeft.diffusion.inputs.facts import ROWS, SIDE, Denoiser
from mmpeft.types import Kwargs

TEXT_WIDTHS = (
    "joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim", "cap_feat_dim", "context_in_dim",
    "in_text_dim", "encoder_hidden_size", "text_in_dim", "cross_attention_input_dim", "cond_token_dim", "dit_text_dim",
    "condition_dim", "llm_features_dim", "cross_attention_dim",
)  # fmt: skip
"""Settings that give the width of a prompt's features; the first that is set, since a projection comes first."""

IMAGE_SCALE = 8
"""Pixels to a latent, along each side."""


def timestep(d: Denoiser) -> Tensor:
    """Two different steps; whole numbers where the norm looks them up in a table."""
    looked_up = d.config.get("norm_type") == "ada_norm"
    return torch.tensor([10, 500], dtype=torch.long if looked_up else d.dtype)


def text(d: Denoiser) -> Tensor | None:
    """Features of the prompt."""
    if d.get("encoder_hid_dim") and d.get("encoder_hid_dim_type") != "image_proj":
        return d.text(d.size("encoder_hid_dim", default=0))
    width = d.size(*TEXT_WIDTHS, default=0)
    return d.text(width) if width else None


def text_mask(d: Denoiser) -> Tensor | None:
    """All tokens of the prompt count; True or 1 alike."""
    features = text(d)
    return None if features is None else torch.ones(features.shape[:2], dtype=torch.bool)


def pooled(d: Denoiser) -> Tensor | None:
    """One vector for the whole prompt."""
    width = d.size("pooled_projection_dim", "in_text_dim2", "text_emb_dim", default=0)
    return d.noise(ROWS, width) if width else None


def guidance(d: Denoiser) -> Tensor | None:
    """The strength of guidance, where a distilled model reads it."""
    return torch.tensor([3.5, 3.5], dtype=d.dtype) if d.get("guidance_embeds") else None


def image_ids(d: Denoiser) -> Tensor:
    """Row and column of every patch, behind as many zeros as the rotation has further axes."""
    axes = len(d.get("axes_dims_rope", "axes_dim", default=(0, 0, 0)))
    ids = torch.zeros(SIDE, SIDE, axes)
    ids[..., axes - 2 if axes == 3 else 1] = torch.arange(SIDE)[:, None]
    ids[..., axes - 1 if axes == 3 else 2] = torch.arange(SIDE)[None]
    return ids.flatten(0, 1)


def text_ids(d: Denoiser) -> Tensor:
    """Positions of the prompt: none."""
    return torch.zeros(d.text_length, len(d.get("axes_dims_rope", "axes_dim", default=(0, 0, 0))))


def class_labels(d: Denoiser) -> Tensor | None:
    """A class for each row, in the form that the embedding of classes takes."""
    kind, inside = d.get("class_embed_type"), d.size("projection_class_embeddings_input_dim", default=0)
    if kind in ("projection", "simple_projection"):
        return d.noise(ROWS, inside)
    if kind == "identity":
        return d.noise(ROWS, 4 * d.size("block_out_channels", default=4))
    if kind == "timestep":
        return torch.tensor([1, 2])
    many = d.get("num_class_embeds")
    by_norm = d.config.get("norm_type") == "ada_norm_zero" and d.get("num_embeds_ada_norm")
    return torch.tensor([0, 1]) if many or by_norm else None


def added_conditions(d: Denoiser) -> Kwargs | None:
    """What SDXL, unCLIP, Kandinsky and PixArt add to the time embedding."""
    kind, projected = d.get("addition_embed_type"), d.get("encoder_hid_dim_type")
    inside = d.size("projection_class_embeddings_input_dim", default=0)
    added: Kwargs = {}
    if kind == "text_time":
        added["time_ids"] = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * ROWS).to(d.dtype)
        added["text_embeds"] = d.noise(ROWS, inside - 6 * d.size("addition_time_embed_dim", default=0))
    if kind == "text_image":
        added["text_embeds"] = d.noise(ROWS, d.size("cross_attention_dim", default=0))
        added["image_embeds"] = d.noise(ROWS, d.size("cross_attention_dim", default=0))
    if kind in ("image", "image_hint") or projected in ("image_proj", "text_image_proj"):
        added["image_embeds"] = d.noise(ROWS, d.size("encoder_hid_dim", "cross_attention_dim", default=0))
    if kind == "image_hint":
        added["hint"] = d.noise(ROWS, 3, IMAGE_SCALE * d.side, IMAGE_SCALE * d.side)
    if d.config.get("norm_type") == "ada_norm_single":  # PixArt asks for the dictionary even where it is not read
        by_size = getattr(d.model, "use_additional_conditions", False)
        added["resolution"] = d.noise(ROWS, 2) if by_size else None
        added["aspect_ratio"] = d.noise(ROWS, 1) if by_size else None
    return added or None


def time_condition(d: Denoiser) -> Tensor | None:
    """Guidance as an embedding (latent consistency models)."""
    width = d.size("time_cond_proj_dim", default=0)
    return d.noise(ROWS, width) if width else None


def control(d: Denoiser) -> Tensor:
    """The image that a ControlNet follows: pixels before an embedding of convolutions, a latent elsewhere."""
    pixels = d.size("conditioning_channels", "ctrl_conditioning_channels", default=0)
    if not pixels:
        extra = d.size("extra_conditioning_channels", "extra_condition_channels", default=0)
        return d.latent(d.channels + extra)
    halved = d.get("conditioning_embedding_out_channels", "ctrl_conditioning_embedding_out_channels")
    side = d.side * (2 ** (len(halved) - 1) if halved else IMAGE_SCALE)
    return d.noise(ROWS, pixels, side, side)


def picture(d: Denoiser) -> Tensor | None:
    """Features of an image beside the prompt."""
    width = d.size("image_dim", "image_embed_dim", "image_proj_dim", default=0)
    return d.noise(ROWS, 4, width) if width else None


def _if(needed: str, give: Callable[[Denoiser], object]) -> Callable[[Denoiser], object]:
    return lambda d: give(d) if d.get(needed) else None


RULES: dict[str, Callable[[Denoiser], object]] = {
    "sample": lambda d: d.latent(),
    "hidden_states": lambda d: d.latent(),
    "timestep": timestep,
    "timesteps": timestep,
    "r_timestep": timestep,
    "timestep_r": lambda d: timestep(d) if d.get("use_meanflow") else None,
    "encoder_hidden_states": text,
    "encoder_hidden_states_image": picture,
    "image_embeds": picture,
    "encoder_attention_mask": lambda d: text_mask(d) if not d.get("down_block_types") else None,
    "encoder_hidden_states_mask": text_mask,
    "pooled_projections": pooled,
    "pooled_embeds": pooled,
    "guidance": guidance,
    "img_ids": image_ids,
    "txt_ids": text_ids,
    "img_shapes": lambda d: [[(1, SIDE, SIDE)]] * ROWS,
    "class_labels": class_labels,
    "added_cond_kwargs": added_conditions,
    "timestep_cond": time_condition,
    "controlnet_cond": control,
    "original_size": lambda d: torch.tensor([[64.0, 64.0]] * ROWS),
    "target_size": lambda d: torch.tensor([[64.0, 64.0]] * ROWS),
    "crop_coords": lambda d: torch.zeros(ROWS, 2),
    "encoder_hidden_states_2": _if("text_embed_2_dim", lambda d: d.text(d.size("text_embed_2_dim", default=0))),
    "encoder_attention_mask_2": _if("text_embed_2_dim", text_mask),
    "encoder_hidden_states_t5": _if("text_embed_dim_t5", lambda d: d.text(d.size("text_embed_dim_t5", default=0))),
    "fps": lambda d: torch.tensor([8, 8]) if "I2VGenXLUNet" in d.names else None,
}
