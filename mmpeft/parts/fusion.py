"""`FusedAdapters`: attention over the outputs of several frozen adapters at one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.functional.pointwise import along
from mmpeft.parts.base import Part, cast
from mmpeft.parts.branch import Branch
from mmpeft.parts.factors import like_options


class FusedAdapters(Part):
    """`h ← h + W_v Σ_n α_n z_n`, `α = softmax_n((W_q h)·(W_k z_n) / T)`, z_n what adapter n would add to h.

    W_q and W_k start at N(0, .02²), `W_v = I + 1e-6`. The adapters' tensors are buffers, and part of what is saved.
    """

    order = 1
    scalable = True
    unmergeable = "attention over adapters depends on the input"

    def __init__(self, adapters: Sequence[Branch], width: int, temperature: float, like: Tensor) -> None:
        super().__init__()
        self.adapters, self.temperature = nn.ModuleList(adapters), temperature
        self.channel_dim = adapters[0].channel_dim
        for module in self.adapters.modules():
            for name, tensor in list(module._parameters.items()):
                del module._parameters[name]
                module.register_buffer(name, None if tensor is None else tensor.detach())
        options = like_options(like)
        self.query = nn.Parameter(torch.empty(width, width, **options).normal_(std=0.02))
        self.key = nn.Parameter(torch.empty(width, width, **options).normal_(std=0.02))
        self.value = nn.Parameter((torch.zeros(width, width, **options) + 1e-6).fill_diagonal_(1.0))

    def frozen(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        for adapter in self._branches():
            adapter.enter(host, x)
        return x

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        values = torch.stack([self._output(adapter, x, y) for adapter in self._branches()], dim=-2)  # [..., N, d]
        # q·(W_k z) = (W_kᵀ q)·z: one product for all adapters
        query, key, value = (cast(w, values.dtype) for w in (self.query, self.key, self.value))
        asked = F.linear(cast(y, values.dtype).movedim(self.channel_dim, -1), query) @ key
        share = ((values * asked[..., None, :]).sum(-1).float() / self.temperature).softmax(-1)
        mixed = F.linear((values * cast(share, values.dtype)[..., None]).sum(-2), value)
        return y + mixed.movedim(-1, self.channel_dim)

    def _branches(self) -> list[Branch]:
        return list(self.adapters)  # type: ignore[arg-type]  # all are branches

    def _output(self, adapter: Branch, x: Tensor, y: Tensor) -> Tensor:
        """What an adapter would add, channels last."""
        z = adapter.shift(x, y)
        if isinstance(adapter.scale, Tensor):
            z = z * along(cast(adapter.scale, z.dtype), z.dim(), self.channel_dim)
        else:
            z = z * adapter.scale
        return z.movedim(self.channel_dim, -1)

    def distance(self) -> Tensor:
        """`‖I - W_v‖²`."""
        eye = torch.eye(len(self.value), dtype=self.value.dtype, device=self.value.device)
        return (eye - self.value).square().sum()
