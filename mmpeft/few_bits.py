"""Weights that torchao and bitsandbytes hold in few bits, behind one interface: a frozen tensor of their true shape."""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LAYERS = ("Linear4bit", "Linear8bitLt")


def packs(cls: type) -> bool:
    """Whether a module of this class multiplies by its weight in a way of bitsandbytes' own."""
    return any(base.__name__ in LAYERS for base in cls.__mro__)


def viewed(module: nn.Module, value: Any) -> Any:
    """The weight of a module as `FewBits` if it is held so, the same one each time; any other value itself.

    What bitsandbytes has not packed yet, which it does on the way to a device, is what it seems to be.
    """
    if type(value) in (Tensor, nn.Parameter) or value is None or value is not module._parameters.get("weight"):
        return value
    assert isinstance(value, Tensor)
    kind = next((kind for kind in (FourBits, EightBits, Torchao) if kind.holds(value)), None)
    if kind is None:
        return value
    view = _VIEWS.get(module)
    if view is None or view.device != value.device or (view.shape, view.dtype) != kind.facts(value):
        view = _VIEWS[module] = kind(module, value)
    return view


def dense(tensor: Tensor) -> Tensor:
    """The values of a tensor held in few bits; any other tensor itself."""
    if isinstance(tensor, FewBits) or Torchao.holds(tensor):
        values: Tensor = tensor.dequantize()
        return values
    return tensor


class FewBits(Tensor):
    """The weight of a module that holds it in few bits; the module keeps its own parameter.

    `F.linear(x, W, b)` is the product of the library that packed it, which keeps no dense weight for the backward
    pass. `dequantize()` gives the values, and any other operation works on these.
    """

    layer: ref[nn.Module]

    @staticmethod
    def __new__(cls, layer: nn.Module, packed: Tensor) -> FewBits:
        shape, dtype = cls.facts(packed)
        found: FewBits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)  # type: ignore
        found.layer = ref(layer)
        return found

    @staticmethod
    @abstractmethod
    def holds(packed: Tensor) -> bool:
        """Whether a parameter is packed in this way."""

    @staticmethod
    @abstractmethod
    def facts(packed: Any) -> tuple[torch.Size, torch.dtype]:
        """True shape, and type of the values."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The values that the bits stand for."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """`x Wᵀ` as the library's own layer computes it."""

    def parts(self) -> tuple[Any, Any]:
        """The module, and the parameter as the library keeps it."""
        layer = self.layer()
        assert layer is not None
        return layer, layer._parameters["weight"]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], FewBits):
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_values, (args, kwargs or {}))
        return func(*args, **kwargs)


class FourBits(FewBits):
    """bitsandbytes' `Params4bit`: NF4 or FP4 in blocks, stored as a column of bytes."""

    @staticmethod
    def holds(packed: Tensor) -> bool:
        return type(packed).__name__ == "Params4bit" and getattr(packed, "quant_state", None) is not None

    @staticmethod
    def facts(packed: Any) -> tuple[torch.Size, torch.dtype]:
        return torch.Size(packed.quant_state.shape), packed.quant_state.dtype

    def dequantize(self) -> Tensor:
        _, packed = self.parts()
        found: Tensor = import_module("bitsandbytes.functional").dequantize_4bit(packed.data, packed.quant_state)
        return found

    def product(self, x: Tensor) -> Tensor:
        layer, packed = self.parts()
        wide = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
        found: Tensor = import_module("bitsandbytes").matmul_4bit(wide, packed.t(), quant_state=packed.quant_state)
        return found.to(x.dtype)


class EightBits(FewBits):
    """bitsandbytes' `Int8Params`: bytes with a scale for each row; outlying inputs are multiplied apart."""

    @staticmethod
    def holds(packed: Tensor) -> bool:
        return type(packed).__name__ == "Int8Params" and packed.dtype == torch.int8

    @staticmethod
    def facts(packed: Any) -> tuple[torch.Size, torch.dtype]:
        return packed.shape, torch.float32

    def dequantize(self) -> Tensor:
        layer, packed = self.parts()
        scale = layer.state.SCB if packed.SCB is None else packed.SCB
        found: Tensor = import_module("bitsandbytes.functional").int8_vectorwise_dequant(packed.data, scale)
        return found

    def product(self, x: Tensor) -> Tensor:
        layer, packed = self.parts()
        state = layer.state
        state.is_training = layer.training
        if packed.CB is not None:  # as in the layer's `init_8bit_state`
            state.CB, state.SCB, packed.CB, packed.SCB = packed.CB, packed.SCB, None, None
        found: Tensor = import_module("bitsandbytes").matmul(x, packed, state=state)
        return found.to(x.dtype)


class Torchao(FewBits):
    """One of torchao's tensors, which know `F.linear` and little else."""

    @staticmethod
    def holds(packed: Tensor) -> bool:
        return type(packed).__module__.startswith("torchao.") and hasattr(packed, "dequantize")

    @staticmethod
    def facts(packed: Any) -> tuple[torch.Size, torch.dtype]:
        return packed.shape, packed.dtype

    def dequantize(self) -> Tensor:
        found: Tensor = self.parts()[1].dequantize()
        return found

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.parts()[1])


class Product:
    """The forward of a packed linear that hosts parts: over the weight it reads, packed, merged or trained."""

    def forward(self, x: Tensor) -> Tensor:
        host: Any = self
        return F.linear(x, viewed(host, host.weight), host.bias)


_VIEWS: WeakKeyDictionary[nn.Module, FewBits] = WeakKeyDictionary()


def _linear(x: Tensor, weight: FewBits, bias: Tensor | None = None) -> Tensor:
    y = weight.product(x)
    return y if bias is None else y + bias.to(y.dtype)


def _values(value: Any) -> Any:
    return value.dequantize() if isinstance(value, FewBits) else value
