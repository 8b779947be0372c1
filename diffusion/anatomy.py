"""What watching cannot see of diffusers' denoisers: names of towers, what speaks of time, which stream is which.

Registered by class name, so that importing this file imports no diffusers. What is said here of a module is checked by
running the models in `tests/unit/test_anatomy_diffusers.py`.

Depth counts residual blocks in the order in which they run: in a UNet down, middle, up, where every ResNet block
and every transformer block is one; samplers and the projections around transformer blocks are outside.

Sub-layers under adaptive norms (DiT, PixArt, SD3, Flux) are gated by the time step on their way to the residual
sum. The gate is no module: what an adapter adds behind such a sub-layer passes it as well.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import nn

from mmpeft.diffusion import inputs
from mmpeft.hosting.host import original_class
from mmpeft.hosting.modules import module_at
from mmpeft.sites import Site, example_inputs, note
from mmpeft.sites.blocks import pattern
from mmpeft.sites.site import DISCARDED

PRESETS = {
    "content": "path=up_blocks.0.attentions.0.*",
    "style": "path=up_blocks.0.attentions.1.*",
}
"""B-LoRA's two halves of SDXL (https://arxiv.org/abs/2403.14572): `at="attn.* & " + PRESETS["style"]`."""

MAPS = "the blocks work on maps; there is no token sequence to put prompts into"
PAIR = "the block takes and returns two streams, image and context; a single tensor does not hold its tokens"
TURNED = "rotary positions are made before the blocks; tokens put in between would have none"
DEAD = f"{DISCARDED}: after the last block nothing reads the context stream"
PROCESSOR = "set AttnProcessor2_0, or the model's own default, before attaching"
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
    found = [replace(_named(model, site), tower=tower) for site in found if site.role != "mixer"]
    found = [_paired(site, found) for site in found]
    found = [made for site in found for made in _single(site, found)]
    tokens = any(s.role == "block" and s.channel_dim == -1 for s in found)
    found = [site for site in found if not (site.role == "tokens" and tokens and _is_map(site, found))]
    return [_placed(model, site, found) for site in found]


def _named(model: nn.Module, site: Site) -> Site:
    names = site.path.split(".")
    fused = site.kind == "linear" and names[-1] in ("to_qkv", "to_kv", "to_added_qkv")
    if fused:
        return replace(site, refuse=FUSED)
    if site.role == "kv" and site.refuse:
        return replace(site, refuse=f"{site.refuse} ({PROCESSOR})")
    if _rests(model, names):
        return replace(site, role="proj", dead=True, refuse=DEAD)
    if site.role == "block" and site.channel_dim == 1 and names[-2] != "attentions":
        return replace(site, inputs=site.inputs or site.width)
    if site.dead or site.kind not in ("linear", "conv", "embedding"):
        if site.role == "attn" and names[-2:] == ["to_out", "0"]:  # on a map, whose tokens it makes itself
            return replace(site, stream="")
        return replace(site, role="cross") if site.role == "attn" and names[-1] in CONTEXT else site
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


def _rests(model: nn.Module, names: list[str]) -> bool:
    """Whether a module asks for a context that looks at nothing: SD3's last block gives none."""
    if names[-1] not in ("add_q_proj", "norm_added_q"):
        return False
    attention = module_at(model, ".".join(names[:-1]))
    return attention._modules.get("to_add_out") is None


def _paired(site: Site, found: list[Site]) -> Site:
    """In a list of blocks on two streams, the last may give one."""
    if site.role not in ("block", "tokens"):
        return site
    alike = [s for s in found if s.role == "block" and pattern(s.path) == pattern(site.path)]
    return replace(site, refuse=PAIR) if site.role == "block" and any(s.refuse for s in alike) else site


def _single(site: Site, found: list[Site]) -> list[Site]:
    """Flux on one stream: attention and feed-forward network side by side, joined in `proj_out`.

    The two are one sub-layer, named by its network. `proj_out` reads the output of attention and the inner activation
    of the network next to each other: it is neither `attn.out` nor `mlp.down` (whose input (IA)³ rescales, say).
    """
    names = site.path.split(".")
    if names[0] != "single_transformer_blocks":
        return [site]
    if len(names) == 2 and site.role in ("block", "tokens"):
        return [replace(site, refuse=PAIR)]
    if names[-1] != "proj_out":
        return [site]
    block = ".".join(names[:2])
    width = next(s.width for s in found if s.path == block and s.role == "block")
    network = replace(
        site, role="mlp", kind="module", width=width, entry=f"{block}.proj_mlp", stream=f"{block}.norm", rows=None
    )
    return [replace(site, role="proj"), network] if site.role == "attn.out" else []


def _is_map(site: Site, found: list[Site]) -> bool:
    return next(s for s in found if s.role == "block" and s.path == site.path).channel_dim == 1


def _placed(model: nn.Module, site: Site, found: list[Site]) -> Site:
    """Prompts stand in the tokens of transformer blocks on one stream; maps have none."""
    if site.role != "tokens":
        return site
    block = next(s for s in found if s.role == "block" and s.path == site.path)
    if block.channel_dim == 1:
        return replace(site, refuse=MAPS)
    names = inspect.signature(original_class(module_at(model, site.path)).forward).parameters
    turned = any(part in name for name in names for part in ("rotary", "rope", "freqs"))
    return replace(site, width=block.width, refuse=block.refuse or (TURNED if turned else ""))
