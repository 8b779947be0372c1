"""The contract between a part and the module that hosts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.hosting.offload import Hooked
from mmpeft.parts.product import Inner, StackReading, WeightProduct
from mmpeft.types import Argument, Attribute, Forward, Output

HookKind = Literal["enter", "exit", "call", "read", "around"]
Call = Callable[[nn.Module, Tensor], Tensor]


class Part(nn.Module):
    """A trainable piece that hangs under a host module and enters its forward pass.

    `enter(host, x)` runs before the host's own forward, `exit(host, x, y)` after it, `around(host, run, ...)`
    runs the host itself, and `read(host, name, base)` answers whenever the backbone reads the host's attribute
    `name`. A part with a `call` hook replaces the host's own forward through `combine`. The innermost part is the
    one with the highest `order`.
    """

    order: int = 0
    rowwise: bool = True
    """Whether `enter` and `exit` act on each row of the batch alone, so that rows can be routed in place."""
    repeated: ClassVar[bool] = False
    """Whether `around` is needed again where recomputation repeats the host; if not, its result is kept."""
    quiet: ClassVar[tuple[str, ...]] = ()
    """Own tensors that a term of the loss or noise moves, and the task alone may not: no liveness is expected."""
    unmergeable: ClassVar[str] = ""
    """Why this part cannot be folded into the base weights; empty when it can."""
    scalable: ClassVar[bool] = False
    """Whether the part changes what the base has, so that `base + α (tuned − base)` is a weaker or stronger part."""
    resting: bool = False
    """Whether the part is left out of the forward pass; hosts see it when they plan anew (`Tuning.leave_out`)."""

    _hf_hook = Hooked()

    @property
    def answers(self) -> bool:
        """Whether `through` tells what the part does to the product by a weight that it reads."""
        return False

    @property
    def stacked(self) -> bool:
        """Whether it answers for a stack of weights, by `one` and `through_stack`."""
        return False

    def one(self, expert: int) -> Part:
        """A part that does to the matrix of one expert what this one does to a stack."""
        raise NotImplementedError

    def through_stack(self, reading: StackReading, inner: Inner, x: Tensor) -> Tensor:
        """`inner(x)`, the product by a stack, with the effect of the part."""
        raise NotImplementedError

    @property
    def needs_input(self) -> bool:
        """Whether what it makes of a weight depends on what the weight is multiplied by, now."""
        return False

    def tensors(self) -> Iterable[Tensor]:
        """What its effect depends on and gradients may reach."""
        return self.parameters()

    def through(self, reading: WeightProduct, inner: Inner, x: Tensor) -> Tensor:
        """`inner(x)`, the product by a weight, with the effect of the part."""
        raise NotImplementedError

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        return x

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y

    def read(self, host: nn.Module, name: str, base: Attribute) -> Attribute:
        return base

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        return run(*args, **kwargs)

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        """Fold the part's effect at one hook into the host's tensors, in place in `params`.

        Raises:
            Refused: the effect is not a change of the host's own tensors.
        """
        if self.unmergeable:
            raise Refused(f"{type(self).__name__} at {hook.path} cannot be merged: {self.unmergeable}")
        if hook.kind == "read":
            params[hook.name] = self.read(host, hook.name, params[hook.name])

    def frozen(self) -> dict[str, Tensor]:
        """Tensors that never train and that a file must hold all the same."""
        return {}

    @classmethod
    def combine(cls, parts: Sequence[Any], host: nn.Module, read: Sequence[str]) -> Call:
        """One callable `(host, x) -> y` for all parts with a `call` hook on a host.

        `read` lists the host's attributes that other parts answer for.
        """
        raise TypeError(f"{cls.__name__} has no call hook")


@dataclass(frozen=True)
class Hook:
    """Where a part enters: the path of a module, how, and for `read` the attribute's name."""

    path: str
    kind: HookKind
    name: str = ""


@dataclass(frozen=True)
class Placement:
    """A part, the module it is registered under, its key there and the hooks through which it enters.

    `depth` is that of the block around it where a method tells blocks apart by it.
    """

    part: Part
    home: str
    key: str
    hooks: tuple[Hook, ...]
    role: str = ""
    depth: int = -1

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with in a file: `blocks.0.attn.qkv.lora_q`."""
        return f"{self.home}.{self.key}" if self.home else self.key


def trainable_dtype(dtype: torch.dtype) -> torch.dtype:
    """Trainable tensors are kept in at least fp32, whatever the frozen base is stored in."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)` without the call when nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
