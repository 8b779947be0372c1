"""A module that hosts parts: the class swap, and the forward pass around the parts.

Follows PyTorch's own `fully_shard` and `parametrize`: the module keeps its object, its type (a cached
subclass, so `isinstance` still holds) and every state-dict key; the parts hang under it as one child named
`mmpeft`. Only `mmpeft.surgery` performs it.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mmpeft.errors import Refused
from mmpeft.few_bits import Product, packs, viewed
from mmpeft.parts.base import Call, Part
from mmpeft.parts.tuned import answered

CHILD = "mmpeft"


@dataclass
class Plan:
    """What a host does in its forward pass under the present route; empty lists are the plain backbone."""

    enter: tuple[Part, ...] = ()
    exit: tuple[Part, ...] = ()
    call: Call | None = None
    reads: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    route: Callable[..., Any] | None = None
    """At the root, runs everything: `route(run, *args, **kwargs)` marks the graph, or runs group after group."""
    wraps: tuple[Part, ...] = ()
    """Parts that run the host themselves, the first one outermost."""
    around: Callable[..., Any] | None = None
    """Runs the host inside `wraps`: recomputation, which repeats it and those of `wraps` that are `repeated`."""
    alone: bool = False
    """Whether `call` is all there is: the common case of a tuned linear, kept free of further tests."""


class TunedMeta(type):
    """Metaclass of the swapped classes; picklable through the recipe that made them."""

    base: type
    reads: frozenset[str]
    packed: bool
    """Whether the module multiplies by its weight in a way of bitsandbytes' own."""

    def __str__(cls) -> str:
        """The backbone's own: transformers keeps by it which outputs a class can record."""
        return str(cls.base)


_CLASSES: dict[tuple[type, frozenset[str]], TunedMeta] = {}


class Host:
    """Mixin in front of a module's own class."""

    _plan: Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan
        if plan.alone and not kwargs:
            return plan.call(self, *args)  # type: ignore[misc, arg-type]
        if plan.route is not None:
            return plan.route(self._run, *args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan
        run = self._wrapped(self._inner, repeated=True)
        if plan.around is not None:
            run = partial(plan.around, run)
        return self._wrapped(run, repeated=False)(*args, **kwargs)

    def _wrapped(self, run: Callable[..., Any], repeated: bool) -> Callable[..., Any]:
        for part in reversed(self._plan.wraps):
            if part.repeated == repeated:
                run = partial(part.around, self, run)  # type: ignore[arg-type]
        return run

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan
        if not (plan.enter or plan.exit or plan.call):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if args:
            x, args = args[0], args[1:]
        else:
            name = next(iter(kwargs))
            x = kwargs.pop(name)
        for part in plan.enter:
            x = part.enter(self, x)  # type: ignore[arg-type]
        y = plan.call(self, x) if plan.call else super().forward(x, *args, **kwargs)  # type: ignore
        for part in plan.exit:
            first, *rest = y if isinstance(y, tuple) else (y,)
            first = part.exit(self, x, first)  # type: ignore[arg-type]
            y = (first, *rest) if isinstance(y, tuple) else first
        return y


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)` through the modules' own tables: attaching asks for hundreds."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]
    return model


def base_value(module: nn.Module, name: str) -> Any:
    """The backbone's own value of an attribute, whatever parts read it; a packed weight in its true shape."""
    for store in (module._parameters, module._buffers, module.__dict__):
        if name in store:
            return viewed(module, store[name])
    raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")


def _reader(name: str) -> property:
    def read(self: Any) -> Any:
        value = base_value(self, name)
        parts = self._plan.reads.get(name)
        return answered(self, name, value, parts) if parts else value

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(read, write)


def tuned_class(base: type, reads: frozenset[str]) -> TunedMeta:
    """The subclass of `base` that hosts parts and lets them answer for the attributes `reads`."""
    key = (base, reads)
    if key not in _CLASSES:
        namespace: dict[str, Any] = {name: _reader(name) for name in reads}
        namespace |= {"base": base, "reads": reads, "__module__": base.__module__, "__doc__": base.__doc__}
        namespace["packed"] = packs(base)
        mixins = (Host, Product) if namespace["packed"] else (Host,)
        _CLASSES[key] = TunedMeta(f"Tuned{base.__name__}", (*mixins, base), namespace)
    return _CLASSES[key]


copyreg.pickle(TunedMeta, lambda cls: (tuned_class, (cls.base, cls.reads)))  # type: ignore[arg-type]


def original_class(module: nn.Module) -> type:
    """A module's class as its library wrote it."""
    cls: type = type(module)
    return cls.base if isinstance(cls, TunedMeta) else cls


def is_host(module: nn.Module) -> bool:
    """Whether a module's class has been swapped."""
    return isinstance(type(module), TunedMeta)


def make_host(module: nn.Module, reads: frozenset[str]) -> None:
    """Swap a module's class, or widen the attributes that parts may answer for."""
    cls: type = type(module)
    if isinstance(cls, TunedMeta):
        reads, cls = reads | cls.reads, cls.base
    else:
        if isinstance(module, torch.jit.ScriptModule):
            raise Refused(f"{cls.__name__} is a TorchScript module; attach before scripting")
        module.__dict__["_plan"] = Plan()
    module.__class__ = tuned_class(cls, reads)  # type: ignore[assignment]


def unmake_host(module: nn.Module) -> None:
    """Give a module its original class back."""
    cls: type = type(module)
    assert isinstance(cls, TunedMeta)
    module.__class__ = cls.base
    del module.__dict__["_plan"]
    module._modules.pop(CHILD, None)


class _RouteMark(Function):
    """Identity that sets the route again before the backward pass of what ran under it.

    Activation checkpointing repeats a forward pass inside the backward pass, when the caller may long have
    switched to another adapter. The mark sits on the model's output, so its backward runs first.
    """

    @staticmethod
    def forward(ctx: Any, set_route: Callable[[Any], Any], route: Any, y: Tensor) -> Tensor:
        ctx.set_route, ctx.route = set_route, route
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        before = ctx.set_route(ctx.route)
        if before is not ctx.route:
            engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(lambda: ctx.set_route(before))
        return None, None, grads[0]


def mark_route(y: Any, set_route: Callable[[Any], Any], route: Any) -> Any:
    """Mark every differentiable tensor of an output with the route it was computed under."""

    def mark(value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return _RouteMark.apply(set_route, route, value)
        return value

    return torch.utils._pytree.tree_map(mark, y)
