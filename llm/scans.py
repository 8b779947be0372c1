"""What scans of transformers do to weights beside calling their modules: fused kernels, and rescaling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from mmpeft.hosting.modules import own_modules
from mmpeft.sites import Site
from mmpeft.types import AnyModule, Untyped

FUSED = {
    "mamba_inner_fn": ("x_proj", "dt_proj", "out_proj"),
    "mamba2_split_conv1d_scan_combined": ("out_proj",),
    "mamba_split_conv1d_scan_combined": ("out_proj",),
}
"""Functions that a kernel may stand for in training, and the projections whose weights they are given."""
RESCALED = (
    "in evaluation the model divides this weight, which a tuned one would not follow, by a power of two; set "
    "config.rescale_every=0"
)


def scans(model: nn.Module, found: list[Site]) -> list[Site]:
    """Sites whose weight is read where a kernel or the model itself does so, whatever is installed here."""
    modules = dict(own_modules(model))
    return [_rescaled(model, _fused(modules, site)) for site in found]


def _fused(modules: dict[str, nn.Module], site: Site) -> Site:
    """The effective weight is what a kernel is given; a change of the call would be passed by in training."""
    above, _, name = site.path.rpartition(".")
    if site.kind != "linear" or site.via == "weight" or above not in modules:
        return site
    if not any(name in names for names in fused(modules[above])):
        return site
    bias = f"{site.path}.bias" if modules[site.path]._parameters.get("bias") is not None else ""
    return replace(site, via="weight", bias=site.bias or bias)


def fused(module: nn.Module) -> list[tuple[str, ...]]:
    """Of each function that a kernel may stand for in the forward pass of a module, the projections it is given."""
    found = []
    for cls in type(module).__mro__:
        code: Untyped = getattr(vars(cls).get("forward"), "__wrapped__", vars(cls).get("forward"))
        while hasattr(code, "__wrapped__"):
            code = code.__wrapped__
        names = getattr(getattr(code, "__code__", None), "co_names", ())
        found += [FUSED[name] for name in names if name in FUSED]
    return found


def _rescaled(model: nn.Module, site: Site) -> Site:
    every = getattr(getattr(model, "config", None), "rescale_every", 0)
    if site.kind != "linear" or not every or site.depth < every or not hasattr(_scaler(model), "layers_are_rescaled"):
        return site
    return replace(site, refuse=RESCALED) if site.path.endswith(("attention.output", "feed_forward.value")) else site


def _scaler(model: nn.Module) -> AnyModule:
    return getattr(model, str(getattr(model, "base_model_prefix", "")), model)


@contextmanager
def references() -> Iterator[None]:
    """Functions that a kernel stands for run as transformers wrote them: kernels take no tensors without data."""
    hub: Untyped = sys.modules.get("transformers.integrations.hub_kernels")
    before = getattr(hub, "is_torchdynamo_exporting", None)
    if before is not None:
        hub.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        if before is not None:
            hub.is_torchdynamo_exporting = before
