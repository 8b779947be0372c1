"""A tuned weight as code reads it: the fused product to whatever multiplies by it, the values to anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mmpeft.hosting.quantized import QuantizedWeight
from mmpeft.hosting.weights import Answer, Seen, Weight, Wrapper
from mmpeft.parts.base import Part, cast
from mmpeft.parts.delta import Delta, stored_in
from mmpeft.parts.factors import LowRank
from mmpeft.parts.linear import multiply
from mmpeft.parts.product import WeightProduct, like, through
from mmpeft.types import AnyFunc, Args, Argument, Ctx, Kwargs


class TunedWeight(Weight):
    """`base` [o, i, ...] (stored [i, o] if `turned`) under `parts`, which answer for this attribute of `host`."""

    host: nn.Module
    attribute: str
    base: Tensor
    parts: tuple[Part, ...]
    turned: bool

    def values(self) -> Tensor:
        found = self.base
        for part in self.parts:
            found = part.read(self.host, self.attribute, found)
        return found.t() if self.turned else found

    def product(self, x: Tensor, bias: Tensor | None, start: int, stop: int) -> Answer:
        reading = self._reading(bias, start, stop)
        low_rank = [part for part in self.parts if isinstance(part, Delta) and isinstance(part.factor, LowRank)]
        if len(low_rank) == len(self.parts) and not (reading.partial and self._interleaved()):
            return multiply(low_rank, reading, x)
        if not self._composes() or (reading.partial and self._interleaved()):
            return NotImplemented
        weight = reading.weight[start:stop] if reading.partial else reading.weight
        y = through(self.parts, reading._replace(bias=None), lambda x: F.linear(x, like(weight, x)), x)
        return y if bias is None else y + cast(bias, y.dtype)

    def convolution(self, run: Callable[..., Tensor], x: Tensor, bias: Tensor | None, options: Args) -> Answer:
        if not self._composes() or (options[3] > 1 and not any(part.needs_input for part in self.parts)):
            return NotImplemented  # the kernels of a grouped convolution are small beside what they are applied to
        kernel = like(self.base, x)
        reading = self._reading(None, 0, self.full[0])
        reading = reading._replace(apply=lambda x, kernel: run(x, kernel, None, *options), groups=options[3])
        y = through(self.parts, reading, lambda x: run(x, kernel, None, *options), x)
        return y if bias is None else y + cast(bias, y.dtype).view(-1, *[1] * (len(self.full) - 2))

    def look_up(self, words: Tensor, padding_idx: int | None) -> Answer:
        if not all(isinstance(part, Delta) and part.lookup for part in self.parts):
            return NotImplemented

        def apply(words: Tensor, table: Tensor) -> Tensor:
            return F.embedding(words, table, padding_idx)

        reading = self._reading(None, 0, self.full[0])._replace(apply=apply)
        return through(self.parts, reading, lambda words: apply(words, cast(self.base, self.seen.dtype)), words)

    def _reading(self, bias: Tensor | None, start: int, stop: int) -> WeightProduct:
        return WeightProduct(self.base.t() if self.turned else self.base, bias, stored_in(self.base), start, stop)

    def _composes(self) -> bool:
        """Whether products beside that of the base cost less than a formed weight, or there is none."""
        formed = [p for p in self.parts if isinstance(p, Delta) and p.formed]
        return not formed or any(part.needs_input for part in self.parts)

    def _interleaved(self) -> bool:
        return any(len(getattr(part, "rows", None) or ()) == 3 for part in self.parts)


class Tuned(TunedWeight, Wrapper):
    """The same without storage of its own, as any eager code reads it."""

    @classmethod
    def read(cls, host: nn.Module, attribute: str, base: Tensor, parts: tuple[Part, ...]) -> Tensor:
        turned = bool(getattr(parts[0], "transposed", False))
        shape, dtype = (base.full, base.seen.dtype) if isinstance(base, QuantizedWeight) else (base.shape, base.dtype)
        full = shape[::-1] if turned else shape
        facts = {"host": host, "attribute": attribute, "base": base, "parts": parts, "turned": turned}
        return in_graph(_Made(cls, full, Seen(0, full[0], dtype, turned), base.device, facts))

    def again(self, seen: Seen) -> Weight:
        facts = {name: self.__dict__[name] for name in ("host", "attribute", "base", "parts", "turned")}
        return in_graph(_Made(type(self), self.full, seen, self.place, facts))


class Traced(TunedWeight):
    """The same over the base itself, for compilers: they follow no tensor without storage."""

    @classmethod
    def read(cls, host: nn.Module, attribute: str, base: Tensor, parts: tuple[Part, ...]) -> Tensor:
        turned = bool(getattr(parts[0], "transposed", False))
        found = base.as_subclass(cls)
        full = base.shape[::-1] if turned else base.shape
        found.host, found.attribute, found.base, found.parts, found.turned = host, attribute, base, parts, turned
        found.full, found.seen = full, Seen(0, full[0], base.dtype, turned)
        return found

    def fact(self, func: AnyFunc, *args: Argument, **kwargs: Argument) -> object:
        return func(self.seen.of(self.base.t() if self.turned else self.base), *args, **kwargs)

    def again(self, seen: Seen) -> Weight:
        found = seen.of(self.base.t() if self.turned else self.base).as_subclass(Traced)
        found.host, found.attribute, found.base, found.parts = self.host, self.attribute, self.base, self.parts
        found.turned, found.full, found.seen = self.turned, self.full, seen
        return found


class _Made(NamedTuple):
    """A tuned weight to be made, and to be made again for its values."""

    cls: type[Tuned]
    full: torch.Size
    seen: Seen
    place: torch.device
    facts: Kwargs

    def __call__(self) -> Tuned:
        return self.cls.of(self.full, self.seen, self.place, **self.facts)


class Maker(Protocol):
    """Makes a weight that answers, again and again; `facts` has its `parts` and its `base`."""

    @property
    def facts(self) -> Kwargs: ...

    def __call__(self) -> Weight: ...


def in_graph(made: Maker) -> Weight:
    """A weight with a place in the graph, if gradients may reach anything that it depends on."""
    if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        inputs = [t for part in made.facts["parts"] for t in part.tensors() if t.requires_grad]
        if made.facts["base"].requires_grad:
            inputs.append(made.facts["base"])
        if inputs:
            found: Weight = _Differentiable.apply(made, *inputs)
            return found
    return made()


class _Differentiable(Function):
    """Gives a tuned weight a place in the graph, for what gets past the functions of `torch`.

    A function of another library that returns the gradient of the whole weight reaches the tuning's tensors here.
    """

    @staticmethod
    def forward(ctx: Ctx, made: Maker, *inputs: Tensor) -> Tensor:
        ctx.made = made
        ctx.save_for_backward(*inputs)
        return made()

    @staticmethod
    def backward(ctx: Ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()
        inputs = ctx.saved_tensors
        with torch.enable_grad():
            values = ctx.made().formed()
            found = torch.autograd.grad(values, inputs, grads[0], create_graph=twice, allow_unused=True)
        return None, *found
