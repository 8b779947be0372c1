"""Every kind of text-to-image pipeline with random weights, small enough for a test."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from mmpeft.diffusion.pipeline import PixelPipeline
from mmpeft.diffusion.text import text_encoder
from mmpeft.embedded.store import WEIGHTS
from tests.support.copies import Copies

PAIR = WEIGHTS / "clip_emoji"
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PAIR)


def clip(projection: bool = False) -> Any:
    own = tokenizer()
    ends = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=1024, max_position_embeddings=32, projection_dim=16, **sizes, **ends)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def image_text_pair(folder: Path) -> Any:
    """A CLIP of transformers, saved in a folder with all that an evaluator needs."""
    text = clip().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    made = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return made


def t5(width: int = 16) -> Any:
    return T5EncoderModel(T5Config(vocab_size=1024, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def vae(shift: float | None = None) -> Any:
    made = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    made.register_to_config(scaling_factor=0.5, shift_factor=shift)
    return made


def unet(**more: Any) -> Any:
    widths = {"block_out_channels": (8, 16), "cross_attention_dim": 16, "attention_head_dim": 4}
    return UNet2DConditionModel(**{"sample_size": 8, **widths, **CROSS, **more})


def _pixel(**part: Any) -> Any:
    encoder, own = text_encoder(PAIR)
    return PixelPipeline(FlowMatchEulerDiscreteScheduler(), encoder, own, **part)


def _pixel_unet() -> Any:
    return _pixel(unet=unet(sample_size=16, in_channels=3, out_channels=3, cross_attention_dim=192))


def _pixel_dit() -> Any:
    return _pixel(transformer=_pixart(16, 3, caption=192, patch=4))


def _pixart(size: int, channels: int, caption: int, patch: int, twice: int = 1) -> Any:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        out_channels=twice * channels,
        caption_channels=caption,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )


def _sd(**scheduler: Any) -> Any:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    width = {"projection_class_embeddings_input_dim": 6 * 8 + 16, "cross_attention_dim": 32}
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(transformer_layers_per_block=(1, 1), use_linear_projection=True, **added, **width),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def _sd3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(0.1),
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer(),
    )


def _flux() -> Any:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(0.1),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
    )


def _sigma() -> Any:
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=_pixart(8, 4, caption=16, patch=2, twice=2),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )


PIPELINES = {
    "pixel-unet": _pixel_unet,
    "pixel-dit": _pixel_dit,
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _sigma,
}


def sized(size: int) -> Any:
    """A pixel pipeline of another size."""
    made = _pixel(unet=unet(sample_size=size, in_channels=3, out_channels=3, cross_attention_dim=192))
    made.set_progress_bar_config(disable=True)
    return made


def pipeline(kind: str, seed: int = 0) -> Any:
    """A pipeline with weights that depend on the seed; zero-initialised outputs are set alive."""
    return _kept(kind, seed)()


@cache
def _kept(kind: str, seed: int) -> Copies[Any]:
    return Copies(partial(_built, kind, seed))


def _built(kind: str, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PIPELINES[kind]()
        for part in made.components.values():
            if isinstance(part, torch.nn.Module):
                for parameter in part.eval().parameters():
                    if not parameter.detach().any():
                        torch.nn.init.normal_(parameter, std=0.05)
    made.set_progress_bar_config(disable=True)
    return made
