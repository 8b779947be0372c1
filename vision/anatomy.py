"""What watching cannot see of timm's backbones: which tokens stand before the patches, and where a prompt has a place.

Registered by class name, so that importing this file imports no timm. What is said here of a module is checked by
running the model in `tests/unit/test_anatomy_timm.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from mmpeft.hosting.modules import module_at
from mmpeft.sites import Connect, Site, example_inputs, note
from mmpeft.vision import inputs
from mmpeft.vision.attention import cosine

TIMM = "timm.models"
WINDOWS = "attention runs inside fixed windows with a bias for every pair of positions; a prompt has no place in them"
RELATIVE = "the relative-position bias is indexed by a fixed number of tokens; a prompt has no entry in it"
NO_TOKENS = "a convolutional network has no token sequence to put prompts into"

example_inputs(inputs.example_inputs)


@note(f"{TIMM}.vision_transformer.VisionTransformer", f"{TIMM}.eva.Eva", f"{TIMM}.beit.Beit")
def plain(model: nn.Module, found: list[Site]) -> list[Site]:
    """Backbones with one stack of blocks on one sequence of tokens."""
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    rotary = getattr(model, "rope", None) is not None
    shared = getattr(model, "rel_pos_bias", None) is not None

    def place(site: Site) -> Site:
        attention = getattr(module_at(model, site.path), "attn", None)
        biased = shared or getattr(attention, "relative_position_bias_table", None) is not None
        reader = f"{site.path}.attn" if rotary else ""
        width, refuse = int(model.embed_dim), RELATIVE if biased else ""  # type: ignore[arg-type]  # timm's width
        return replace(site, width=width, prefix=prefix, prefix_reader=reader, refuse=refuse)

    return _tokens(found, place)


@note(f"{TIMM}.swin_transformer.SwinTransformer")
def windowed(model: nn.Module, found: list[Site]) -> list[Site]:
    """Swin: stages of blocks on a grid `[B, H, W, C]`."""
    return _tokens(found, lambda site: replace(site, refuse=WINDOWS))


@note(f"{TIMM}.swin_transformer_v2.SwinTransformerV2")
def cosine_windowed(model: nn.Module, found: list[Site]) -> list[Site]:
    """SwinV2, whose scores are cosines: learned keys are normalised as its own."""
    connected = [replace(s, connect=Connect("", cosine)) if s.role == "kv" else s for s in found]
    return windowed(model, connected)


@note(f"{TIMM}.convnext.ConvNeXt")
def convolutional(model: nn.Module, found: list[Site]) -> list[Site]:
    """ConvNeXt: stages of blocks on maps `[B, C, H, W]`."""
    return _tokens(found, lambda site: replace(site, refuse=NO_TOKENS))


def _tokens(found: list[Site], place: Callable[[Site], Site]) -> list[Site]:
    return [place(site) if site.role == "tokens" else site for site in found]
