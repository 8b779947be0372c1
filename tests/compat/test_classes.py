"""Modules whose classes are unusual: metaclasses, borrowed and inherited forwards, slots, calls of their own."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import pickle
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import MMPEFTError
from mmpeft.sites import Site, anatomy, qualified_name
from tests.compat.models import close, differ, tuned, untouched
from tests.compat.rows import row


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """The base's own."""
        return self.up(torch.relu(self.q(x))) * gain


class Abstract(Base, abc.ABC):
    @abc.abstractmethod
    def width(self) -> int: ...


class WithABCMeta(Abstract):
    def width(self) -> int:
        return 8


class _Registry(type):
    """A metaclass that keeps a list and insists on its own keyword."""

    known: list[str] = []  # noqa: RUF012

    def __new__(mcs, name: str, bases: Any, namespace: Any, **options: Any) -> Any:
        mcs.known.append(name)
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name: str, bases: Any, namespace: Any, **options: Any) -> None:
        super().__init__(name, bases, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.made_by_metaclass = True
        return made

    @property
    def label(cls) -> str:
        return f"label of {cls.__name__}"


class WithOwnMeta(Base, metaclass=_Registry):
    pass


class WithSubclassHook(Base):
    """A class that demands something of whoever derives from it."""

    def __init_subclass__(cls, *, purpose: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if not purpose:
            raise TypeError("say what the subclass is for: class X(WithSubclassHook, purpose=...)")


def _borrowed(self: Any, x: Tensor) -> Tensor:
    return self.up(self.q(x))


class Borrowed(Base):
    forward = _borrowed


class Partial(Base):
    forward = functools.partialmethod(_borrowed)


class Decorated(Base):
    @torch.no_grad()
    def probe(self, x: Tensor) -> Tensor:
        return self(x)

    @functools.wraps(Base.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class Grandchild(Borrowed):
    """Has no forward of its own."""


class Great(Grandchild):
    pass


class OwnCall(Base):
    """A call of its own around the usual one."""

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return super().__call__(x, **options) + 1


class _Doubled:
    def __get__(self, module: Any, owner: Any = None) -> Any:
        return self if module is None else module._factor * 2

    def __set__(self, module: Any, value: float) -> None:
        module._factor = value


class Described(Base):
    factor = _Doubled()

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Attributes(Base):
    """Looks everything up by itself."""

    def __getattr__(self, name: str) -> Any:
        return 4.0 if name == "conjured" else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.conjured


class Static(Base):
    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        return 2 * x

    @classmethod
    def named(cls) -> str:
        return cls.__name__

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(super().forward(x)) if self.named() == "Static" else x


class ByClass(Base):
    """Asks for its class exactly and reads the name of it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.__class__.__name__ != "ByClass" or type(self).__qualname__ != "ByClass":
            raise RuntimeError(f"this is a {type(self).__name__}")
        return super().forward(x)


class ByParent(Base):
    """Calls its parent's forward on the class and `super` with both arguments."""

    def forward(self, x: Tensor) -> Tensor:
        return Base.forward(self, x) + super(ByParent, self).forward(x)  # noqa: UP008


T = TypeVar("T")


class Typed(Base, Generic[T]):
    pass


class Mixed(nn.Sequential):
    """A container with a forward of its own, at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(8, 8), nn.Linear(8, 8)


def _local() -> Base:
    class Local(Base):
        pass

    return Local()


ROOTS = [WithABCMeta, WithOwnMeta, WithSubclassHook, Borrowed, Partial, Decorated, Grandchild, Great, OwnCall]
ROOTS += [Described, Attributes, Static, ByClass, ByParent, Typed]


@anatomy(qualified_name(Base))
def _sites(model: nn.Module) -> list[Site]:
    return [Site("q", "attn.q", 0, kind="linear"), Site("up", "mlp.up", 0, kind="linear")]


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@row(
    "torch",
    "ABCMeta, own metaclass, `__init_subclass__`, `forward = function`, partialmethod, grandparent's forward,"
    " own `__call__`, descriptors, `__getattr__`, class checks in forward",
)
@pytest.mark.parametrize("cls", ROOTS, ids=lambda c: c.__name__)
def test_roots_of_unusual_classes(cls: Any) -> None:
    torch.manual_seed(0)
    model = cls()
    before = untouched(model)
    tuning, _, expected = tuned(model)
    differ(model(X), before(X))
    close(model(X), expected(X))
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert inspect.signature(model.forward) == inspect.signature(before.forward)
    assert isinstance(type(model), type(cls))
    copied = copy.deepcopy(model)
    close(copied(X), expected(X))
    close(pickle.loads(pickle.dumps(model))(X), expected(X))
    tuning.detach()
    assert type(model) is cls
    close(model(X), before(X))


class _Linear(nn.Linear):
    pass


class MetaLinear(nn.Linear, metaclass=_Registry):
    pass


class AbstractLinear(nn.Linear, abc.ABC):
    pass


class CallLinear(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class ScaledLinear(nn.Linear):
    """A linear that is more than its weight: the update must not replace its forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 0.5) + 0.25


class PropertyLinear(nn.Linear):
    """Its weight is made when it is read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        raw = self._parameters.pop("weight")
        self.raw = nn.Parameter(raw.detach().clone())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.tanh(self.raw)


class Hook(Base):
    def __init__(self, inner: type[nn.Linear]) -> None:
        super().__init__()
        self.q = inner(8, 8)


@row(
    "torch",
    "tuned layers of unusual classes: metaclass, own `__call__`, a forward that does more than `W x + b`",
    "the update is added to what the layer computes, or refused",
)
@pytest.mark.parametrize(
    "inner", [_Linear, MetaLinear, AbstractLinear, CallLinear, ScaledLinear, PropertyLinear], ids=lambda c: c.__name__
)
def test_tuned_layers_of_unusual_classes(inner: Any) -> None:
    torch.manual_seed(0)
    model = Hook(inner)
    before = untouched(model)
    try:
        tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.q"))
    except MMPEFTError:  # refused: the model is as it was
        assert type(model.q) is inner
        close(model(X), before(X))
        return
    close(model(X), before(X))  # at a zero update
    with torch.no_grad():
        for p in tuning.parameters():
            p.normal_(std=0.2)
    expected = copy.deepcopy(before)
    part = tuning.placements[0].part
    with torch.no_grad():
        effective = part.read(expected.q, "weight", expected.q.weight)
        if inner is PropertyLinear:
            effective = torch.atanh(effective.clamp(-0.999, 0.999))
        (expected.q.raw if inner is PropertyLinear else expected.q.weight).copy_(effective)
    differ(model(X), before(X))
    close(model(X), expected(X))
    tuning.detach()
    assert type(model.q) is inner
    close(model(X), before(X))


@row("torch", "a class defined inside a function: copied; pickling raises what the untouched model raises")
def test_a_local_class_copies_and_does_not_pickle() -> None:
    model = _local()
    before = untouched(model)
    _, _, expected = tuned(model)
    close(copy.deepcopy(model)(X), expected(X))
    for one in (before, model):
        with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
            pickle.dumps(one)
