"""What every cell must do: refused with a reason that the method gives itself, or working; merging, or why not."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import nn

from mmpeft.errors import MMPEFTError
from mmpeft.methods import Method
from mmpeft.methods.additive.adapter_fusion import AdapterFusion
from mmpeft.sites import Site
from tests.matrix.cells import FUSED


def refusal(method: Method, model: nn.Module, available: list[Site]) -> MMPEFTError | None:
    """What `attach` must raise, by what the method says that it needs and refuses; None where it must work."""
    asked = FUSED if isinstance(method, AdapterFusion) else method  # without adapters there is nothing to fuse
    try:
        asked.check(model, available)
    except MMPEFTError as error:
        return error
    return None


QUANTIZED = "llama_*"
NO_ROOM = "no room for an update"
UNMERGEABLE = {
    **{("SSF", family): "no state dict" for family in ("beit", "eva", "eva02", "rope_vit", "swinv2")},
    **{("SSF", family): "reads no bias" for family in ("llama", "gemma2", "phi3", "t5", "sd3", "flux", "helios")},
    ("LoRA+BitFit+Houlsby", QUANTIZED): "no linear map",
    **{(method, QUANTIZED): NO_ROOM for method in ("*oRA*", "DiffFit", "IA3", "KronA", "Lo?*", "PaFi", "RandomMask")},
    ("SSF", QUANTIZED): NO_ROOM,
}
"""(method pattern, family pattern) of cells that cannot be merged, beyond methods that never can, and why.

The key bias of BEiT and its kin is a buffer of zeros that no state dict has.
"""


def unmergeable(label: str, family: str) -> str | None:
    """Why a cell whose method merges elsewhere does not merge, or None."""
    return next(
        (
            why
            for (method, pattern), why in UNMERGEABLE.items()
            if (label == method or fnmatch(label, method)) and fnmatch(family, pattern)
        ),
        None,
    )
