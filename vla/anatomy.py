"""What watching cannot see of open_clip's models: the names of their towers, and where a prompt has a place.

Registered by class name, so that importing this file imports no open_clip. A timm image tower and a transformers text
tower have the notes of their own domains.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mmpeft.hosting.modules import module_at
from mmpeft.sites import Connect, Site, example_inputs, note
from mmpeft.vla import inputs
from mmpeft.vla.attention import multihead

TEXT = "the causal mask and the pooled position are fixed before the blocks; a prompt in between has no place in them"
COSINE = "open_clip's scaled cosine attention multiplies [B, h, n, d] by torch.bmm, which takes no such tensors"
OPEN_CLIP = "open_clip"
TOWERS = {"visual": "image", "text_decoder": "decoder"}

example_inputs(inputs.example_inputs)


@note(f"{OPEN_CLIP}.model.CLIP", f"{OPEN_CLIP}.model.CustomTextCLIP", f"{OPEN_CLIP}.coca_model.CoCa")
def pair(model: nn.Module, found: list[Site]) -> list[Site]:
    """A pair of towers; CoCa's text decoder is a third, `decoder`, with cross-attention blocks between the others."""
    named = [replace(site, tower=TOWERS.get(site.path.split(".")[0], "text")) for site in found]
    # what takes the text of an inner model is not what takes this one's
    named = [replace(site, connect=None) if site.kind == "embedding" else site for site in named]
    named = [replace(s, path=f"{s.path}.resblocks") if s.role == "stack" and s.tower == "decoder" else s for s in named]
    return [
        replace(s, depth=int(s.path.split(".")[2])) if s.tower == "decoder" and s.depth >= 0 else s
        for s in named
        if s.role != "tokens" or ".cross_attn." not in s.path
    ]


@note(f"{OPEN_CLIP}.transformer.VisionTransformer")
def image(model: nn.Module, found: list[Site]) -> list[Site]:
    """open_clip's own image tower: one token before the patches."""
    width = {s.path: s.width for s in found if s.role == "block"}
    tower = [replace(site, tower="image") for site in _attentions(model, found)]
    return [replace(s, width=width[s.path], prefix=1, refuse="") if s.role == "tokens" else s for s in tower]


@note(f"{OPEN_CLIP}.transformer.TextTransformer", f"{OPEN_CLIP}.transformer.Transformer")
def text(model: nn.Module, found: list[Site]) -> list[Site]:
    """open_clip's own text tower, or its blocks alone."""
    width = {s.path: s.width for s in found if s.role == "block"}
    tower = _attentions(model, found)
    return [replace(s, width=width[s.path], prefix=1, refuse=TEXT) if s.role == "tokens" else s for s in tower]


def _attentions(model: nn.Module, found: list[Site]) -> list[Site]:
    """Learned keys enter `nn.MultiheadAttention`, which calls none of its projections, around the whole."""

    def connected(site: Site) -> Site:
        attention = module_at(model, site.path)
        if isinstance(attention, nn.MultiheadAttention):
            return replace(site, connect=Connect("", multihead))
        return replace(site, refuse=COSINE) if getattr(attention, "logit_scale", None) is not None else site

    return [connected(site) if site.role == "kv" else site for site in found]
