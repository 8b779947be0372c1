"""How a `Rescale` part enters at a site, shared by the scaling methods."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.parts import Rescale
from mmpeft.parts.base import Hook, Placement
from mmpeft.sites import Site


def place_rescale(
    key: str,
    model: nn.Module,
    site: Site,
    like: Tensor,
    *,
    side: Literal["input", "output"],
    shift: bool,
) -> Placement:
    """One `Rescale` at a site: around the call, or on the weight and bias where the backbone reads them."""
    if side == "input":
        width, rows = like.shape[1], None
        channel = -1
    else:
        width, rows = len(like), site.rows
        channel = 1 if site.kind == "conv" else site.channel_dim
    bias_home, _, bias_name = site.bias.rpartition(".")
    part = Rescale(
        width,
        like,
        side=side,
        rows=rows,
        shift=shift,
        channel_dim=channel,
        bias_owner=bias_name,
        transposed=site.transposed,
    )
    if site.via == "call":
        hooks: tuple[Hook, ...] = (Hook(site.path, "enter" if side == "input" else "exit"),)
    else:
        if shift and not site.bias:
            raise Refused(
                f"a shift at {site}: the backbone reads the weight directly and adds no bias that could hold it"
            )
        hooks = (Hook(site.path, "read", site.tensor),)
        if site.bias and side == "output":
            hooks += (Hook(bias_home, "read", bias_name),)
    return Placement(part, site.path, f"{key}_{site.label}", hooks, site.role)
