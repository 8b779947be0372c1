"""Gates: how much of a part acts, by the token, by the sequence or everywhere; and parts behind one.

`y + g (part(y) - y)` is the plain `y` exactly where the gate is closed.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmpeft.errors import ConfigError, Refused
from mmpeft.parts.base import Part
from mmpeft.parts.branch import Branch
from mmpeft.parts.passing import Passed
from mmpeft.parts.prefix import Prefix
from mmpeft.parts.product import Inner, WeightProduct
from mmpeft.parts.shared import View
from mmpeft.types import Argument, Attribute, Forward, Output

GateKind = Literal["constant", "scalar", "token", "pooled"]
GATES = get_args(GateKind)

UNMERGEABLE = "how much of it acts depends on a gate, and a weight has none"


class Gate(nn.Module):
    """`g(x)` of x [B, ..., d] with channels last.

    `constant`: `start`. `scalar`: one learned number that starts there. `token`: `σ(w·x_t + b)` for each position.
    `pooled`: its mean over the positions of a row; those that a padding mask names are left out, and without a mask
    all count, padding too. w ~ N(0, .02²), b = 0: both sigmoids start about half open.
    """

    total: Tensor
    seen: Tensor

    def __init__(self, kind: GateKind, width: int, start: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        if kind not in GATES:
            raise ConfigError(f"unknown gate {kind!r}; known: {', '.join(GATES)}")
        self.kind, self.start = kind, start
        if kind == "scalar":
            self.level = nn.Parameter(torch.full((1,), start, device=device, dtype=dtype))
        elif kind != "constant":
            self.linear = nn.Linear(width, 1, device=device, dtype=dtype)
            nn.init.normal_(self.linear.weight, std=0.02)
            nn.init.zeros_(self.linear.bias)
        for name in ("total", "seen"):
            self.register_buffer(name, torch.zeros((), device=device), persistent=False)

    @staticmethod
    def count(kind: GateKind, width: int) -> int:
        """Trainable parameters."""
        return {"constant": 0, "scalar": 1}.get(kind, width + 1)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """[B, ..., 1] by the token, [B, 1, ..., 1] pooled, [1] otherwise; `padding` [B, n] is true where x counts."""
        if self.kind == "constant":
            return x.new_tensor([self.start])
        if self.kind == "scalar":
            g: Tensor = self.level
        else:
            g = torch.sigmoid(self.linear(x))
            places = tuple(range(1, x.dim() - 1))
            if self.kind == "pooled" and places:
                if padding is not None:
                    weight = padding.to(g.dtype).unsqueeze(-1)
                    g = (g * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
                else:
                    g = g.mean(places, keepdim=True)
        if self.training:
            with torch.no_grad():
                self.total += g.mean()
                self.seen += 1
        return g


class Padding(Part):
    """Which positions the attention mask of a block leaves in, for pooled gates inside it; owns no tensor.

    `position` is that of `attention_mask` among the block's arguments. It is read again where the block is repeated.
    """

    order = -2
    rowwise = False
    repeated = True
    unmergeable = UNMERGEABLE

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position
        self.seen: Passed[Tensor] = Passed()

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        given = args[self.position] if len(args) > self.position else kwargs.get("attention_mask")
        self.seen.set(visible(given))
        return run(*args, **kwargs)


def visible(mask: object) -> Tensor | None:
    """[B, m], true where some query sees a key, of a mask [B, m] or [B, h, n, m]; None where no such mask is given."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    seen = mask if mask.dtype == torch.bool or mask.dim() == 2 else mask == 0  # scores: 0 or very negative
    return (seen if seen.dim() == 2 else seen[:, 0].any(1)).bool()


class GatedPart(Part):
    """A part and its gate."""

    unmergeable = UNMERGEABLE

    def __init__(self, inner: Part, gate: Gate, padding: Padding | None = None) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate
        self.padding = View(padding) if padding is not None else None

    def level(self, x: Tensor) -> Tensor:
        """The gate for x [B, ..., d], padding left out where the mask of the block tells it."""
        seen = self.padding().seen.get() if self.padding else None
        g: Tensor = self.gate(x, seen if seen is not None and seen.shape == x.shape[:-1] else None)
        return g


class GatedOutput(GatedPart):
    """A part that changes an output, `y + g(src) (part(y) - y)`: the source is what the part itself reads.

    Of an update of a weight that is `y + g(x) ⊙ s ΔW x`, of an adapter `h + g(src) ⊙ U σ(D src)`.
    """

    def __init__(self, inner: Part, gate: Gate, padding: Padding | None = None, channel_dim: int = -1) -> None:
        super().__init__(inner, gate, padding)
        self.order = inner.order
        self.channel_dim = channel_dim
        self._tapped: Passed[Tensor] = Passed()

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        self._tapped.set(x)
        return self.inner.enter(host, x)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        source = x
        if isinstance(self.inner, Branch) and self.inner.source != "input":
            tapped = self._tapped.set(None)
            assert tapped is not None or self.inner.source == "output"
            source = y if self.inner.source == "output" or tapped is None else tapped
        return self._mixed(source, y, self.inner.exit(host, x, y))

    def _mixed(self, source: Tensor, y: Tensor, tuned: Tensor) -> Tensor:
        if self.channel_dim == -1:
            return mixed(y, tuned, self.level(source))
        g = self.level(source.movedim(self.channel_dim, -1))
        return mixed(y, tuned, g.movedim(-1, self.channel_dim) if g.dim() > 1 else g)

    @property
    def answers(self) -> bool:
        return self.inner.answers

    @property
    def needs_input(self) -> bool:
        return True

    @property
    def transposed(self) -> bool:
        return bool(getattr(self.inner, "transposed", False))

    @property
    def rows(self) -> Attribute:
        return getattr(self.inner, "rows", None)

    def through(self, reading: WeightProduct, inner: Inner, x: Tensor) -> Tensor:
        y = inner(x)
        return self._mixed(x, y, self.inner.through(reading, lambda _: y, x))

    def read(self, host: nn.Module, name: str, base: Attribute) -> Attribute:
        raise Refused(
            f"{type(host).__name__} uses {name} for more than products by it; a gate on its update sees what it is "
            "multiplied by, so the tuned weight has no values of its own: choose other sites, or no gate there"
        )


class GatedKeys(GatedPart):
    """A prefix whose share of the attention is gated, `(1 - g λ) attention(K, V) + g λ attention(P_K, P_V)`.

    λ is the share of the prefix under one softmax; the gate turns it and not the keys, for a key scaled to zero still
    takes its share. As λ is linear in the output, that is the attention without and with the prefix, interpolated.
    """

    order = -1
    rowwise = False
    repeated = True

    inner: Prefix

    def __init__(self, inner: Prefix, gate: Gate, padding: Padding | None = None) -> None:
        super().__init__(inner, gate, padding)
        self._seen: Passed[Tensor] = Passed()

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        """Where the attention calls a function: keep what the module sees for the gate."""
        self._seen.set(x)
        return x

    def read(self, host: nn.Module, name: str, base: Attribute) -> Attribute:
        return self.inner.view(host, base, self)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.extend(keys, values)

    def interpolate(self, plain: Tensor, full: Tensor) -> Tensor:
        """The gated output of outputs [B, n, H, d] without and with the prefix."""
        x = self._seen.set(None)
        assert x is not None, "the attention ran without its module"
        g = self.level(x)
        return mixed(plain, full, g.unsqueeze(-1) if g.dim() > 1 else g)

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        """Where the whole module is run: what follows the attention is linear, so its outputs are interpolated."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        plain = run(*args, **kwargs)
        full = self.inner.view(host, run, [self.inner], args, kwargs)
        first = getattr(host, "batch_first", True)
        g = self.level(x if first else x.transpose(0, 1))
        g = g if first or g.dim() == 1 else g.transpose(0, 1)
        return tree_map(lambda a, b: mixed(a, b, g) if isinstance(a, Tensor) else a, plain, full)


def mixed(plain: Tensor, tuned: Tensor, g: Tensor) -> Tensor:
    """`plain + g (tuned - plain)`, exact for g of 0 and 1."""
    return torch.lerp(plain.to(tuned.dtype), tuned, g.to(tuned.dtype))
