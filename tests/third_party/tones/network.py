"""A small transformer over windows of a waveform."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WINDOW = 16


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ToneNet(nn.Module):
    def __init__(self, classes: int, width: int = 16, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(WINDOW, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, wave: Tensor) -> Tensor:
        """Scores [B, classes] of waveforms [B, samples]."""
        x = self.embed(wave.unflatten(-1, (-1, WINDOW)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))
