"""Features of a tower's blocks, wherever its library keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.sites import sites
from mmpeft.sites.builder import is_a


class Taps:
    """Blocks of a tower by the anatomy's sites; in an image tower `prefix` tokens stand before the patches."""

    def __init__(self, model: nn.Module, tower: Literal["image", "text"] = "image") -> None:
        found = [s for s in sites(model) if s.tower == tower]
        self.model, self.tower = model, tower
        self.paths = [s.path for s in sorted(found, key=lambda s: s.depth) if s.role == "block"]
        if tower == "text":
            self.prefix, self.width = 0, next(s.width for s in found if s.role == "block")
            return
        tokens = [s for s in found if s.role == "tokens"]
        if not tokens or any(s.refuse for s in tokens):
            raise Refused(f"the image tower of {type(model).__name__} sees no plain sequence of patches to decode from")
        self.prefix, self.width = tokens[0].prefix, tokens[0].width

    @property
    def blocks(self) -> list[Any]:
        """The block modules."""
        return [self.model.get_submodule(path) for path in self.paths]

    def layers(self, wanted: Sequence[int] | None, count: int = 3) -> list[int]:
        """Depths to decode from: those wanted, or `count` spread over the tower up to its last block.

        Raises:
            ConfigError: a depth that the tower does not have.
        """
        last = len(self.paths) - 1
        depths = list(wanted) if wanted else [round(last * (i + 1) / count) for i in range(count)]
        if not depths or min(depths) < 0 or max(depths) > last:
            raise ConfigError(f"the image tower has blocks 0 … {last}, asked for {depths}")
        return depths

    def __call__(self, inputs: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
        """Outputs [B, prefix + n, d] of blocks at `depths` for images or token numbers; the tower runs once."""
        return self.embedded(inputs, depths)[0]

    def embedded(self, inputs: Tensor, depths: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
        """Outputs of blocks at `depths`, and what the tower makes of the whole in the joint space [B, e]."""
        kept: dict[int, Tensor] = {}

        def keep(depth: int) -> Any:
            return lambda module, inputs, output: kept.__setitem__(depth, output)

        handles = [self.blocks[depth].register_forward_hook(keep(depth)) for depth in set(depths)]
        try:
            encode: Any = self.model.encode_image if self.tower == "image" else self.model.encode_text
            whole: Tensor = encode(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return kept, whole

    def patches(self, features: Tensor) -> Tensor:
        """Features without the tokens before the patches, [B, n, d]."""
        return features[:, self.prefix :]


def grid_of(patches: int, image: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of n patches over an image (height, width).

    Raises:
        Refused: they fill no grid (a prompt that stays in the sequence lengthens it).
    """
    side = math.sqrt(image[0] * image[1] / patches)
    rows, columns = round(image[0] / side), round(image[1] / side)
    if rows * columns != patches:
        raise Refused(f"{patches} tokens fill no grid over {tuple(image)} pixels; deep prompts would")
    return rows, columns


def projection(model: Any) -> Callable[[Tensor], Tensor]:
    """What takes a token [.., d] of the last block into the joint space, as the tower does with what it pools.

    Raises:
        Refused: the tower pools by attention, or is none with tokens.
    """
    visual = model.visual
    if (
        is_a(visual, "TimmModel")
        and getattr(visual.trunk, "attn_pool", None) is None
        and hasattr(visual.trunk, "blocks")
    ):
        return lambda x: visual.head(visual.trunk.fc_norm(visual.trunk.norm(x)))
    if is_a(visual, "VisionTransformer") and visual.attn_pool is None:
        return lambda x: visual.ln_post(x) if visual.proj is None else torch.matmul(visual.ln_post(x), visual.proj)
    raise Refused(
        f"single tokens of {type(visual).__name__} are not in the joint space: SAN needs a tower that pools a class "
        "token or a mean; CLIPSegDecoder works with this one"
    )
