"""Features of a model's blocks, wherever its library keeps them; for decoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.sites import sites
from mmpeft.types import Forward, Output


class Taps:
    """The blocks of a tower, by the sites of its model; before the patches of an image stand `prefix` tokens."""

    def __init__(
        self,
        model: nn.Module,
        tower: str | None = None,
        run: Callable[[Tensor], Output] | None = None,
        patches: bool = True,
    ) -> None:
        """
        Args:
            model: tuned or not.
            tower: its name; None for a model of one tower.
            run: what runs the tower; None for the model itself.
            patches: whether its tokens must be those of an image, and their number before the patches known.

        Raises:
            Refused: the tower sees no plain sequence of tokens.
        """
        found = [s for s in sites(model) if tower is None or s.tower == tower]
        blocks = sorted((s for s in found if s.role == "block"), key=lambda s: s.depth)
        tokens = [s for s in found if s.role == "tokens"]
        name = f"the {tower} tower of {type(model).__name__}" if tower else type(model).__name__
        if not blocks or (patches and (not tokens or any(s.refuse for s in tokens))):
            raise Refused(f"{name} sees no plain sequence of {'patches' if patches else 'tokens'} to decode from")
        self.model, self.run, self.name = model, run or model, name
        self.paths = [s.path for s in blocks]
        self.prefix, self.width = (tokens[0].prefix, tokens[0].width) if patches else (0, blocks[0].width)

    @property
    def blocks(self) -> list[nn.Module]:
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
            raise ConfigError(f"{self.name} has blocks 0 … {last}, asked for {depths}")
        return depths

    def __call__(self, inputs: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
        """Outputs [B, prefix + n, d] of blocks at `depths` for images or token numbers; the tower runs once."""
        return self.embedded(inputs, depths)[0]

    def embedded(self, inputs: Tensor, depths: Sequence[int]) -> tuple[dict[int, Tensor], Output]:
        """Outputs of blocks at `depths`, and what the tower makes of the whole."""
        kept: dict[int, Tensor] = {}

        def keep(depth: int) -> Forward:
            return lambda module, inputs, output: kept.__setitem__(depth, output)

        handles = [self.blocks[depth].register_forward_hook(keep(depth)) for depth in set(depths)]
        try:
            whole = self.run(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return kept, whole

    @torch.no_grad()
    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches that the tower makes of images of a size."""
        last = len(self.paths) - 1
        return grid_of(self.patches(self(torch.zeros(1, 3, *size), [last])[last]).shape[1], size)

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
