"""Factors: how the update of a weight is parametrised."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.functional.hadamard import hadamard_product, khatri_rao
from mmpeft.functional.kron import kron_apply, kron_sum
from mmpeft.functional.low_rank import low_rank_delta
from mmpeft.hosting.offload import Hooked
from mmpeft.parts.base import cast, trainable_dtype
from mmpeft.types import Kwargs


def like_options(like: Tensor) -> Kwargs:
    """Device and type of tensors that train beside `like`."""
    return {"device": like.device, "dtype": trainable_dtype(like.dtype)}


class Factor(nn.Module):
    """`ΔW` [o, i] of a weight: `forward(x)` is `ΔW x`, `materialise()` is `ΔW` itself."""

    _hf_hook = Hooked()

    def materialise(self) -> Tensor:
        raise NotImplementedError


class LowRank(Factor):
    """The factor `ΔW = B A`, `A` [r, i] Kaiming-uniform, `B` [o, r] zero (Hu et al. 2021).

    For a `lookup` of columns it is the other way round, `A` zero and `B` normal, as in the reference code.
    """

    def __init__(self, rows: int, columns: int, rank: int, like: Tensor, lookup: bool = False) -> None:
        super().__init__()
        options = like_options(like)
        bound = 1 / math.sqrt(columns)  # Kaiming-uniform with a = √5
        if lookup:
            self.A = nn.Parameter(torch.zeros(rank, columns, **options))
            self.B = nn.Parameter(torch.randn(rows, rank, **options))
        else:
            self.A = nn.Parameter(torch.empty(rank, columns, **options).uniform_(-bound, bound))
            self.B = nn.Parameter(torch.zeros(rows, rank, **options))

    def pair(self) -> tuple[Tensor, Tensor]:
        """`A` and `B` as they act now."""
        return self.A, self.B

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.pair()
        return F.linear(F.linear(x, cast(down, x.dtype)), cast(up, x.dtype))

    def materialise(self) -> Tensor:
        return low_rank_delta(*self.pair(), 1.0)

    def components(self) -> list[tuple[Tensor, Tensor]]:
        """The rank-one pieces `(B_k, A_k)`."""
        down, up = self.pair()
        return list(zip(up.T, down))


class DiagonalLowRank(LowRank):
    """`ΔW = B diag(g) A`: each rank component has a weight of its own, and none when that is 0.

    `start` is where g starts: `zero` with A, B ~ N(0, .02²) (AdaLoRA), or `normal` with B = 0 (SoRA).
    """

    def __init__(self, rows: int, columns: int, rank: int, like: Tensor, start: str) -> None:
        super().__init__(rows, columns, rank, like)
        if start == "zero":
            nn.init.normal_(self.A, std=0.02)
            nn.init.normal_(self.B, std=0.02)
        self.g = nn.Parameter(torch.zeros(rank, **like_options(like)))
        if start == "normal":
            nn.init.normal_(self.g)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B * self.g


class NestedLowRank(LowRank):
    """The first `active` components alone, `(r / b) B[:, :b] A[:b]`: with a scale `α / r` outside, that is `α / b`."""

    def __init__(self, rows: int, columns: int, rank: int, like: Tensor) -> None:
        super().__init__(rows, columns, rank, like)
        self.active, self.newest_alone = rank, False

    def pair(self) -> tuple[Tensor, Tensor]:
        b, rank = self.active, len(self.A)
        down, up = self.A[:b], self.B[:, :b]
        if self.newest_alone and self.training and b > 1:
            down = torch.cat([down[:-1].detach(), down[-1:]])
            up = torch.cat([up[:, :-1].detach(), up[:, -1:]], dim=1)
        return down, up * (rank / b)


class Kron(Factor):
    """`ΔW = L ⊗ R`, `L` [a, c] Kaiming-uniform and `R` [b, d] zero, `a b = o` and `c d = i`; never formed in a call."""

    def __init__(self, left: tuple[int, int], right: tuple[int, int], like: Tensor) -> None:
        super().__init__()
        options = like_options(like)
        bound = 1 / math.sqrt(left[1])
        self.left = nn.Parameter(torch.empty(*left, **options).uniform_(-bound, bound))
        self.right = nn.Parameter(torch.zeros(*right, **options))

    def forward(self, x: Tensor) -> Tensor:
        return kron_apply(x, cast(self.left, x.dtype), cast(self.right, x.dtype))

    def materialise(self) -> Tensor:
        return torch.kron(self.left, self.right)


class LowRankKron(Factor):
    """`ΔW = L ⊗ (B A)`, `L` [a, c] and `A` [r, d] Kaiming-uniform, `B` [b, r] zero."""

    def __init__(self, left: tuple[int, int], right: tuple[int, int], rank: int, like: Tensor) -> None:
        super().__init__()
        options = like_options(like)
        bound, inner = 1 / math.sqrt(left[1]), 1 / math.sqrt(right[1])
        self.left = nn.Parameter(torch.empty(*left, **options).uniform_(-bound, bound))
        self.A = nn.Parameter(torch.empty(rank, right[1], **options).uniform_(-inner, inner))
        self.B = nn.Parameter(torch.zeros(right[0], rank, **options))

    def forward(self, x: Tensor) -> Tensor:
        inner = kron_apply(x, cast(self.left, x.dtype), cast(self.A, x.dtype))
        rows: Tensor = inner.unflatten(-1, (len(self.left), len(self.A)))
        return F.linear(rows, cast(self.B, x.dtype)).flatten(-2)

    def materialise(self) -> Tensor:
        return torch.kron(self.left, self.B @ self.A)


class Hadamard(Factor):
    """`ΔW = (B₁ A₁) ⊙ (B₂ A₂)`, formed in every call; `A` ~ N(0, 1), `B₁` ~ N(0, .1²), `B₂` zero."""

    def __init__(self, rows: int, columns: int, rank: int, like: Tensor) -> None:
        nn.Module.__init__(self)  # `KhatriRao` is also a `LowRank`, whose own pair it does not want
        options = like_options(like)
        self.A1 = nn.Parameter(torch.randn(rank, columns, **options))
        self.B1 = nn.Parameter(torch.randn(rows, rank, **options) * 0.1)
        self.A2 = nn.Parameter(torch.randn(rank, columns, **options))
        self.B2 = nn.Parameter(torch.zeros(rows, rank, **options))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(self.materialise(), x.dtype))

    def pair(self) -> tuple[Tensor, Tensor]:
        """`A` and `B` of the low-rank product of rank r² that it equals."""
        up, down = khatri_rao(self.B1, self.A1, self.B2, self.A2)
        return down, up

    def materialise(self) -> Tensor:
        return hadamard_product(self.B1, self.A1, self.B2, self.A2)


class KhatriRao(Hadamard, LowRank):
    """The same ΔW as a product of rank r², which is less work than forming it while r² is small."""

    def forward(self, x: Tensor) -> Tensor:
        return LowRank.forward(self, x)


class PHMBank(nn.Module):
    """`A` [n, n, n], the n small matrices that all linears of a `PHMLinear` family share; N(0, .01)."""

    def __init__(self, n: int, like: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n, n, n, **like_options(like)).normal_(std=0.01))


class PHMLinear(nn.Module):
    """`W = Σ_k A_k ⊗ (s_k t_kᵀ)` [o, i] and a bias, `A` shared, `s` [n, o/n] and `t` [n, i/n] own (arXiv:2106.04647).

    s and t are Glorot-uniform, so W is small and not zero.
    """

    def __init__(self, columns: int, rows: int, n: int, bank: Callable[[], PHMBank], like: Tensor) -> None:
        super().__init__()
        options = like_options(like)
        self.bank = bank
        self.s = nn.Parameter(_glorot(torch.empty(n, rows // n, **options)))
        self.t = nn.Parameter(_glorot(torch.empty(n, columns // n, **options)))
        self.bias = nn.Parameter(torch.zeros(rows, **options))

    @property
    def weight(self) -> Tensor:
        return kron_sum(self.bank().A, self.s, self.t)


def _glorot(vectors: Tensor) -> Tensor:
    """Each row a [m, 1] matrix: U(±√(6 / (m + 1)))."""
    bound = math.sqrt(6 / (vectors.shape[1] + 1))
    return vectors.uniform_(-bound, bound)
