"""`Prefix`: learned keys and values in front of those an attention computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.hosting.forward import plan_of
from mmpeft.parts.base import Part, cast, trainable_dtype
from mmpeft.types import Argument, Attribute, Forward, Kwargs, Output

View = Forward


class KeyValues(Part):
    """A part that enters an attention: by what it reads from an attribute, or around it, all such parts at once."""

    order = 0
    rowwise = False
    repeated = True

    view: View

    def read(self, host: nn.Module, name: str, base: Attribute) -> Attribute:
        return self.view(host, base, self)

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        parts = [part for part in plan_of(host).wraps if isinstance(part, KeyValues)]
        return self.view(host, run, parts, args, kwargs) if parts[0] is self else run(*args, **kwargs)


class PrefixMLP(nn.Module):
    """`[K; V]_l = W_l tanh(W E + b) + b_l` for all layers l: one embedding E [p, d] behind every prefix."""

    def __init__(self, count: int, width: int, hidden: int, sizes: list[int], like: Tensor) -> None:
        super().__init__()
        options: Kwargs = {"device": like.device, "dtype": trainable_dtype(like.dtype)}
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.randn(count, width, **options))
        self.inner = nn.Linear(width, hidden, **options)
        self.outer = nn.Linear(hidden, sum(sizes), **options)

    def layer(self, index: int) -> Tensor:
        """Keys and values of one layer, [p, 2 h d]."""
        start = sum(self.sizes[:index])
        rows = slice(start, start + self.sizes[index])
        hidden = torch.tanh(self.inner(self.embedding))
        return F.linear(hidden, self.outer.weight[rows], self.outer.bias[rows])


class Prefix(KeyValues):
    """`softmax(q [K_p; K]ᵀ) [V_p; V]` with `p` learned keys and values [p, h, d] for each key-value head.

    They carry no position: keys are prepended after rotation. Owned here as one tensor [2, p, h, d], or generated
    by a `PrefixMLP` that the first layer's part owns and all of them read.
    """

    unmergeable = "learned keys and values lengthen the attended sequence; no base weight can stand for them"

    def __init__(
        self, count: int, heads: int, width: int, like: Tensor, view: View, mlp: tuple[PrefixMLP, int] | None = None
    ) -> None:
        super().__init__()
        self.count, self.heads, self.width, self.view = count, heads, width, view
        self.tokens: nn.Parameter | None = None
        self._source = mlp  # a tuple: registered below the first layer's part only
        if mlp is None:
            options: Kwargs = {"device": like.device, "dtype": trainable_dtype(like.dtype)}
            self.tokens = nn.Parameter(torch.randn(2, count, heads, width, **options))
        elif mlp[1] == 0:
            self.mlp = mlp[0]

    def keys_and_values(self) -> Tensor:
        """[2, p, h, d]."""
        if self.tokens is not None:
            return self.tokens
        assert self._source is not None
        mlp, index = self._source
        return mlp.layer(index).view(self.count, 2, self.heads, self.width).transpose(0, 1)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend to keys and values [B, h, n, d]; of heads that were repeated for their queries, so are the own."""
        own = self.batch(cast(self.keys_and_values(), keys.dtype), len(keys)).transpose(2, 3)
        return self._before(own[0], keys), self._before(own[1], values)

    def _before(self, own: Tensor, others: Tensor) -> Tensor:
        if others.shape[1] != self.heads:
            own = own.repeat_interleave(others.shape[1] // self.heads, 1)
        return torch.cat([own, others], dim=2)

    def batch(self, own: Tensor, rows: int) -> Tensor:
        """What `keys_and_values` gave for that many rows of an attention, [2, B, p, h, d]."""
        return own.unsqueeze(1).expand(-1, rows, -1, -1, -1)


class MixedPrefix(Prefix):
    """A prefix for each row, `P[b] = Σ_i Σ_m w_i[b, m] P_i[m]`: a view of others that owns nothing.

    `P_i[m]` [2, p, h, d] are the components that prefix i holds side by side as M_i p tokens, w_i is [B, M_i].
    """

    def __init__(self, parts: Sequence[Prefix], weights: Sequence[Tensor]) -> None:
        nn.Module.__init__(self)
        first = parts[0]
        self._parts, self._weights = tuple(parts), tuple(weights)  # tuples: registered under their own hosts only
        self.heads, self.width, self.view = first.heads, first.width, first.view
        sizes = [(part.count, weight.shape[1]) for part, weight in zip(parts, weights)]
        lengths = {count / components for count, components in sizes}
        self.count = sizes[0][0] // sizes[0][1]
        if lengths != {self.count}:
            raise ConfigError(f"tokens and components {sizes} of the prefixes mixed are not all of one length")

    def keys_and_values(self) -> Tensor:
        """[2, B, p, h, d]."""
        mixed = []
        for part, weight in zip(self._parts, self._weights):
            components = part.keys_and_values().unflatten(1, (-1, self.count))
            mixed.append(torch.einsum("bm,smphd->sbphd", cast(weight, components.dtype), components))
        return torch.stack(mixed).sum(0)

    def batch(self, own: Tensor, rows: int) -> Tensor:
        """Attentions that fold windows or frames into the batch see the rows of one sample one after the other."""
        fold, rest = divmod(rows, own.shape[1])
        if rest:
            raise ConfigError(f"a Mixture has weights for {own.shape[1]} rows, but the batch has {rows}")
        return own.repeat_interleave(fold, dim=1) if fold > 1 else own


class GatedPrefix(KeyValues):
    """`attention(q, K, V) + tanh(g) softmax(q K_pᵀ/√d) V_p`, `K_p`, `V_p` projected from tokens [p, d] by the layer.

    The gate `g`, one scalar a layer, starts at 0 (LLaMA-Adapter, arXiv:2303.16199). The two softmaxes are apart, so
    that a closed gate leaves the model as it was.
    """

    unmergeable = "a second softmax over learned keys is no change of the base weights"

    def __init__(
        self,
        count: int,
        width: int,
        head: int,
        project: tuple[Callable[[Tensor], Tensor], ...],
        like: Tensor,
        view: View,
    ) -> None:
        super().__init__()
        options: Kwargs = {"device": like.device, "dtype": trainable_dtype(like.dtype)}
        self.count, self.head, self.view, self.project = count, head, view, project
        self.tokens = nn.Parameter(torch.randn(count, width, **options))
        self.gate = nn.Parameter(torch.zeros(1, **options))

    def projected(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, p, d] of the tokens for queries [B, H, n, d]."""
        tokens = cast(self.tokens, queries.dtype)
        made = (project(tokens).view(self.count, -1, self.head).transpose(0, 1)[None] for project in self.project)
        groups = [t.repeat_interleave(queries.shape[1] // t.shape[1], dim=1) for t in made]
        keys, values = (t.expand(len(queries), -1, -1, -1) for t in groups)
        return keys, values

    def beside(self, queries: Tensor, scaling: float) -> Tensor:
        """The gated second attention for queries [B, H, n, d]; [B, n, H, d]."""
        found = F.scaled_dot_product_attention(queries, *self.projected(queries), scale=scaling)
        return found.transpose(1, 2) * cast(torch.tanh(self.gate), queries.dtype)
