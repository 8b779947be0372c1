"""What a part is told of a product by a weight, and the products of tuned weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mmpeft.hosting.quantized import viewed

if TYPE_CHECKING:
    from mmpeft.parts.base import Part

Apply = Callable[[Tensor, Tensor], Tensor]
Inner = Callable[[Tensor], Tensor]

FUSED_FROM = 32_768
"""Input elements from which the fused autograd function pays for its own call overhead."""


class WeightProduct(NamedTuple):
    """One product by a frozen weight W [o, i, ...]; what comes out are its rows `start:stop`.

    `stored` are the tensors that W is kept in, `apply(x, kernel)` is the same convolution or look-up by another kernel
    or table, and `groups` those of a convolution.
    """

    weight: Tensor
    bias: Tensor | None
    stored: tuple[Tensor, ...]
    start: int
    stop: int
    apply: Apply | None = None
    groups: int = 1

    @property
    def partial(self) -> bool:
        return self.stop - self.start != len(self.weight)


class StackReading(NamedTuple):
    """One product by the matrices of a frozen stack.

    `weight` [experts, o, i] are all of them. `apply(x, kernel)` is the same product by another stack, or by one matrix
    for all. `spread(vectors)` lays a vector of each expert along what goes in or comes out, whose channels are in
    dimension `channel`.
    """

    weight: Tensor
    apply: Apply
    spread: Callable[[Tensor], Tensor]
    channel: int


def through(parts: Sequence[Part], reading: WeightProduct, inner: Inner, x: Tensor) -> Tensor:
    """`x` through a product and the parts around it, the innermost part first."""
    for part in parts:
        inner = _Through(part, reading, inner)
    return inner(x)


class _Through:
    def __init__(self, part: Part, reading: WeightProduct, inner: Inner) -> None:
        self.part, self.reading, self.inner = part, reading, inner

    def __call__(self, x: Tensor) -> Tensor:
        return self.part.through(self.reading, self.inner, x)


def fusible(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused function is exact here and pays: eager, and a plain frozen floating-point weight."""
    return (
        not torch.compiler.is_compiling()  # asked first: a size that is compared is a size that is fixed
        and not torch._C._is_tracing()
        and x.numel() >= FUSED_FROM
        and not weight.requires_grad
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not torch._C._are_functorch_transforms_active()
    )


def like(weight: Tensor, x: Tensor) -> Tensor:
    """A plain weight in the type of what it multiplies; autocast and quantised ones see to that themselves."""
    if type(weight) not in (Tensor, nn.Parameter) or torch.is_autocast_enabled(x.device.type):
        return weight
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


def host_weight(host: nn.Module) -> Tensor:
    """The weight that a host multiplies by, whatever parts read it."""
    weight: Tensor = host.weight  # type: ignore[assignment]  # a layer's own
    found: Tensor = viewed(host, weight) if getattr(type(host), "mmpeft_packed", False) else weight
    return found
