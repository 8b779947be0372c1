"""What watching cannot see of diffusers' denoisers: customary names of towers, what speaks of time, which stream is which.

Registered by class name, so that importing this file imports no diffusers. What is said here of a module is checked by
running the models in `tests/unit/test_anatomy_diffusers.py`.

Depth counts residual blocks in the order in which they run: in a UNet down, middle, up, where every ResNet block
and every transformer block is one; samplers and the projections around transformer blocks are outside.

Sub-layers under adaptive norms (DiT, PixArt, SD3, Flux) are gated by the time step on their way to the residual
sum. The gate is no module: what an adapter adds behind such a sub-layer passes it as well.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mmpeft.diffusion import inputs
from mmpeft.hosting.modules import module_at
from mmpeft.sites import Site, example_inputs, note

PRESETS = {
    "content": "path=up_blocks.0.attentions.0.*",
    "style": "path=up_blocks.0.attentions.1.*",
}
"""B-LoRA's two halves of SDXL (https://arxiv.org/abs/2403.14572): `at="attn.* & " + PRESETS["style"]`."""

MAPS = "the blocks work on maps; there is no token sequence to put prompts into"
FUSED = "its projections are fused into another one; call the model's unfuse_qkv_projections() before attaching"

STAGES = ("down_blocks", "mid_block", "up_blocks")
TIME = {
    "time_embedding",
    "time_emb_proj",
    "add_embedding",
    "class_embedding",
    "adaln_single",
    "time_text_embed",
    "timestep_embedder",
    "proj_out_1",
}
"""Modules of the conditioning on time, size, class and pooled text. DiT's `proj_out_1` scales and shifts the
last norm by the time step; the head is `proj_out_2`."""
EMBEDDINGS = {"conv_in", "pos_embed.proj", "x_embedder", "context_embedder", "latent_image_embedding.emb"}
HEADS = {"conv_out", "proj_out", "proj_out_2", "out"}
CONTEXT = {f"add_{name}_proj": f"cross.{name}" for name in "qkv"} | {"to_add_out": "cross.out"}
"""Projections of the second stream of a joint attention."""

example_inputs(inputs.example_inputs)


@note("diffusers.models.modeling_utils.ModelMixin")
def denoiser(model: nn.Module, found: list[Site]) -> list[Site]:
    """A UNet (tower `unet`), or a transformer on patches (tower `dit`)."""
    tower = "unet" if "down_blocks" in model._modules else "dit"
    found = [replace(_named(model, site), tower=tower) for site in found]
    return [_placed(site, found) for site in found if site.role != "mixer"]


def _named(model: nn.Module, site: Site) -> Site:
    names = site.path.split(".")
    fused = site.kind == "linear" and names[-1] in ("to_qkv", "to_kv", "to_added_qkv")
    if fused:
        return replace(site, refuse=FUSED)
    if site.dead or site.kind not in ("linear", "conv", "embedding"):
        return replace(site, role="cross", stream=_second(site)) if site.role == "attn" and names[-1] in CONTEXT else site
    if names[-1] in CONTEXT:
        return replace(site, role=CONTEXT[names[-1]])
    adaptive = names[-1] == "linear" and names[-2].startswith("norm")
    if adaptive or (TIME & set(names) and site.role not in ("attn.q", "attn.k", "attn.v")):
        return replace(site, role="time")
    if site.role in ("proj", "embed", "head", "time"):
        return replace(site, role=_outside(model, site, names))
    return site


def _outside(model: nn.Module, site: Site, names: list[str]) -> str:
    """The role of what is no part of a sub-layer, by its customary name."""
    if site.path in EMBEDDINGS or site.path in HEADS:
        return "embed" if site.path in EMBEDDINGS else "head"
    if site.kind == "embedding":
        return "time"
    spatial = isinstance(module_at(model, site.path), nn.Conv2d)
    return "conv" if spatial and names[0] in STAGES and names[-1] not in ("proj_in", "proj_out") else "proj"


def _second(site: Site) -> str:
    return site.stream


def _placed(site: Site, found: list[Site]) -> Site:
    """Prompts stand in the tokens of transformer blocks on one stream; maps have none."""
    if site.role != "tokens":
        return site
    block = next(s for s in found if s.role == "block" and s.path == site.path)
    if block.refuse or block.channel_dim == 1:
        return replace(site, refuse=block.refuse or MAPS)
    return replace(site, width=block.width, refuse="")
