"""A small backbone with an anatomy of its own: what the core is tested on without any domain library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.sites import Site, anatomy, qualified_name


class Layer(nn.Module):
    """A residual block: one projection for attention's sake, one feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(self.norm(x))
        return x + self.down(torch.relu(self.up(x)))


class Toy(nn.Module):
    """Two blocks and a head, on sequences `[B, N, width]`."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.Sequential(Layer(width), Layer(width))
            self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


@anatomy(qualified_name(Toy))
def toy(model: nn.Module) -> list[Site]:
    """The sites of `Toy`."""
    found = []
    for i, block in enumerate(model.blocks):
        path, width = f"blocks.{i}", block.q.in_features
        found += [
            Site(f"{path}.q", "attn.q", i, kind="linear"),
            Site(f"{path}.up", "mlp.up", i, kind="linear"),
            Site(f"{path}.down", "mlp.down", i, kind="linear"),
            Site(f"{path}.norm", "norm", i, kind="norm", width=width),
            Site(path, "block", i, width=width),
        ]
    return [*found, Site("head", "head", kind="linear")]
