"""How a `Rescale` part enters at a site, shared by the scaling methods."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.parts import ExpertsRescale, Rescale
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
    bias_name = site.bias.rpartition(".")[2]
    if site.kind == "experts":
        part: Rescale | ExpertsRescale = ExpertsRescale(like, side, site.rows, bias_name, site.transposed)
        return Placement(part, site.path, f"{key}_{site.label}", _read(site, side), site.role)
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
        hooks = _read(site, side)
    return Placement(part, site.path, f"{key}_{site.label}", hooks, site.role)


def _read(site: Site, side: Literal["input", "output"]) -> tuple[Hook, ...]:
    """Where the backbone reads the weight itself: that, and the bias that it adds."""
    home, _, name = site.bias.rpartition(".")
    bias = (Hook(home, "read", name),) if site.bias and side == "output" else ()
    return (Hook(site.path, "read", site.tensor), *bias)
