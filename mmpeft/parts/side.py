"""`SideLayer`: one rung of a narrow stack beside a backbone that runs without gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.hosting.output import first_of, with_first
from mmpeft.parts.base import Part, cast
from mmpeft.parts.factors import like_options
from mmpeft.types import Argument, Forward, Kwargs, Output, StateDict

EXPANSION = 4


class SideBlock(nn.Module):
    """`u ← u + attention(norm(u))`, `u ← u + W_2 gelu(W_1 norm(u))`; without attention each token by itself."""

    def __init__(self, width: int, attention: bool, options: Kwargs) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, width // 32), 0, -1) if width % h == 0)
        self.qkv: nn.Linear | None = None
        if attention:
            self.norm1 = nn.LayerNorm(width, **options)
            self.qkv = nn.Linear(width, 3 * width, **options)
            self.out = nn.Linear(width, width, **options)
        self.norm2 = nn.LayerNorm(width, **options)
        self.fc1 = nn.Linear(width, EXPANSION * width, **options)
        self.fc2 = nn.Linear(EXPANSION * width, width, **options)

    @staticmethod
    def count(width: int, attention: bool) -> int:
        mlp = 2 * width + 2 * EXPANSION * width**2 + (EXPANSION + 1) * width
        return mlp + (2 * width + 4 * width**2 + 4 * width) * attention

    def forward(self, u: Tensor) -> Tensor:
        if self.qkv is not None:
            q, k, v = self.qkv(self.norm1(u)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            u = u + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(u))))
        return u + hidden


class Ladder:
    """How far one forward pass has climbed; shared by the rungs of a stack, empty between passes."""

    def __init__(self) -> None:
        self.u: Tensor | None = None
        self.place = 0

    def __getstate__(self) -> StateDict:
        return {"u": None, "place": 0}


class SideLayer(Part):
    """`u_i = SideBlock_i(μ_i u_{i-1} + (1 - μ_i) W_i↓ sg(h_i))`, `μ_i = sigmoid(α_i / T)`, h_i this block's output.

    The first rung starts from `W↓` of its block's input; the last gives `W↑ u` in place of h, or added to it. The
    block runs without gradients, so that nothing of it is kept for the backward pass. Where the width changes from
    block to block a linear map takes u over, and where a map changes its size u is pooled to it. A rung that is
    dropped owns nothing and only runs its block.
    """

    order = 0
    rowwise = False
    unmergeable = "a second stack beside the backbone is no change of the backbone's weights"

    def __init__(self, ladder: Ladder, index: int, temperature: float, channel_dim: int) -> None:
        super().__init__()
        self._ladder = (ladder,)
        self.index, self.temperature, self.channel_dim = index, temperature, channel_dim
        self.start: nn.Linear | None = None
        self.bridge: nn.Linear | None = None
        self.down: nn.Linear | None = None
        self.up: nn.Linear | None = None
        self.add = False

    def climb(self, width: int, side: int, below: int, attention: bool, like: Tensor) -> None:
        """Own a rung: `below` is the width of the rung under this one."""
        options = like_options(like)
        self.down = nn.Linear(width, side, bias=False, **options)
        self.alpha = nn.Parameter(torch.zeros((), **options))
        if below != side:
            self.bridge = nn.Linear(below, side, bias=False, **options)
        self.block = SideBlock(side, attention, options)

    def begin(self, width: int, side: int, like: Tensor) -> None:
        self.start = nn.Linear(width, side, bias=False, **like_options(like))

    def end(self, side: int, width: int, add: bool, like: Tensor) -> None:
        self.up = nn.Linear(side, width, bias=False, **like_options(like))
        self.add = add
        if add:
            nn.init.zeros_(self.up.weight)

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        (ladder,) = self._ladder
        x = args[0] if args else next(iter(kwargs.values()))
        if self.start is not None:
            ladder.u, ladder.place = self.start(self._see(x)), self.index
        elif ladder.place != self.index:
            raise Refused(
                "LST: a block ran out of turn. Blocks that share weights have no side stack, and the backbone's own "
                "gradient checkpointing must be off: LST keeps nothing of the backbone for the backward pass"
            )
        with torch.no_grad():
            output = run(*args, **kwargs)
        y = first_of(output)
        assert ladder.u is not None
        if self.down is not None:
            ladder.u = self._rung(ladder.u, self._see(y))
        ladder.place += 1
        if self.up is None:
            return output
        result = self.up(ladder.u)
        ladder.u, ladder.place = None, 0
        result = cast(result if self.channel_dim == -1 else result.movedim(-1, self.channel_dim), y.dtype)
        result = y + result if self.add else result
        return with_first(output, result)

    def _see(self, h: Tensor) -> Tensor:
        h = h.detach() if self.channel_dim == -1 else h.detach().movedim(self.channel_dim, -1)
        return cast(h, self._type())

    def _type(self) -> torch.dtype:
        linear = self.start or self.down
        return torch.float32 if linear is None else linear.weight.dtype

    def _rung(self, u: Tensor, h: Tensor) -> Tensor:
        assert self.down is not None
        if u.shape[1:-1] != h.shape[1:-1]:
            if h.dim() != 4:
                raise Refused(f"LST: the sequence changes from {u.shape[1]} to {h.shape[1]} tokens between two blocks")
            u = F.adaptive_avg_pool2d(u.movedim(-1, 1), h.shape[1:-1]).movedim(1, -1)  # type: ignore[arg-type]  # 2-D
        if self.bridge is not None:
            u = self.bridge(u)
        z = self.down(h)
        mixed: Tensor = self.block(
            torch.lerp(z, cast(u, z.dtype), cast(torch.sigmoid(self.alpha / self.temperature), z.dtype))
        )
        return mixed
