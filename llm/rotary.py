"""Keys of a prefix between two conventions: the text at its own positions, or moved behind the prefix.

Attention's scores depend on `R(i) q · k` for a key that carries no position. Where the text is moved by p, queries are
`R(i + p) q`: the same scores need `R(p) k`. This holds for rotations alone, which is checked on the model's own ones.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.hosting.host import original_class
from mmpeft.hosting.modules import module_at
from mmpeft.sites import Site
from mmpeft.types import AnyModule, Config

VARYING = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length of the text."""


def shifted(model: nn.Module, site: Site, keys: Tensor, by: int) -> Tensor:
    """`R(by) k` for keys [p, h, d] of one attention.

    Raises:
        Refused: positions enter the model otherwise than by one fixed rotation of queries and keys.
    """
    config: Config = model.config
    if getattr(config, "sliding_window", None):
        raise Refused(f"{site}: a sliding window, out of which moved prefixes would fall and others would not")
    home = sys.modules[original_class(module_at(model, site.path)).__module__]
    turn = getattr(home, "apply_rotary_pos_emb", None)
    found: list[AnyModule] = [m for m in model.modules() if isinstance(m._buffers.get("inv_freq"), Tensor)]
    if turn is None or len(found) != 1 or site.role != "kv":
        raise Refused(
            f"{site}: positions of {type(model).__name__} are no rotation (learned embeddings, or biases by distance); "
            "moving the text behind the prefix changes more than its keys can make up for"
        )
    kind = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    if kind in VARYING:
        raise Refused(f"{site}: rotary embeddings of type {kind!r} change with the length of the text")
    rotary = found[0]
    scale = float(getattr(rotary, "attention_scaling", 1.0))

    def rotate(x: Tensor, position: int) -> Tensor:
        positions = torch.tensor([[position]], device=rotary.inv_freq.device)
        cos, sin = (part.double().to(x.device) / scale for part in rotary(x.double(), positions))
        size = cos.shape[-1]
        heads = x.double().transpose(0, 1)[None]  # [1, h, p, d]
        inner = turn(heads[..., :size], heads[..., :size], cos, sin)[1]
        return torch.cat([inner, heads[..., size:]], dim=-1)[0].transpose(0, 1)

    probe = torch.randn(2, *keys.shape[1:], generator=torch.Generator().manual_seed(0)).to(keys.device)
    moved = (rotate(probe[:1], by + 3) * rotate(probe[1:], by)).sum(-1)
    if not torch.allclose(moved, (rotate(probe[:1], 3) * probe[1:].double()).sum(-1), atol=1e-3):
        raise Refused(f"{site}: what {home.__name__} does to keys and queries is no rotation by their distance")
    return rotate(keys, by).to(keys.dtype)
