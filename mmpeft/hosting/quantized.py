"""Weights that torchao and bitsandbytes hold quantised, behind one interface: a frozen tensor of their true shape."""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft.hosting.answers  # noqa: F401  (fills in what weights answer)
from mmpeft.hosting.weights import Answer, Operand, Seen, Wrapper
from mmpeft.types import AnyModule, Attribute, Untyped

LAYERS = ("Linear4bit", "Linear8bitLt")


def packs(cls: type) -> bool:
    """Whether a module of this class multiplies by its weight in a way of bitsandbytes' own."""
    return any(base.__name__ in LAYERS for base in cls.__mro__)


def viewed(module: nn.Module, value: Attribute) -> Attribute:
    """The weight of a module as `QuantizedWeight` if it is held so, the same one each time; any other value itself.

    What bitsandbytes has not packed yet, which it does on the way to a device, is what it seems to be.
    """
    if type(value) in (Tensor, nn.Parameter) or value is None or value is not module._parameters.get("weight"):
        return value
    assert isinstance(value, Tensor)
    kind = next((kind for kind in (FourBits, EightBits, Torchao) if kind.holds(value)), None)
    if kind is None:
        return value
    view = _VIEWS.get(module)
    if view is None or view.place != value.device or (view.full, view.seen.dtype) != kind.facts(value):
        view = _VIEWS[module] = kind.held(module, value)
    return view


def dense(tensor: Tensor) -> Tensor:
    """The values of a tensor quantised; any other tensor itself."""
    if isinstance(tensor, QuantizedWeight) or Torchao.holds(tensor):
        values: Tensor = tensor.dequantize()
        return values
    return tensor


def guard(module: nn.Module) -> None:
    """Keep a `Linear4bit` of bitsandbytes from rearranging its bits, and undo it where that has happened.

    On a CPU with AVX512-BF16 its first forward pass without gradients rearranges them for a kernel for inference: the
    values that are read from then on are others, and no gradient passes. What the rearranged bits stand for stays, the
    scales rounded to bfloat16 included.
    """
    if not getattr(module, "support_avx512bf16_for_cpu", False) and not _rearranged(module):
        return
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # bitsandbytes's own flag
    if _rearranged(module):
        packed: Untyped = module._parameters["weight"]
        state = packed.quant_state
        scales = state.absmax.t().reshape(-1).float()  # kept [blocks, rows] beside the rearranged bits
        state.original_nested = False  # to quantise the scales again would round them once more
        packed.data, state = import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse(
            packed.data, state
        )
        state.absmax = scales
        packed.quant_state = module.quant_state = state


def _rearranged(module: nn.Module) -> bool:
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


class QuantizedWeight(Wrapper):
    """The weight of a module that holds it quantised; the module keeps its own parameter.

    `F.linear(x, W, b)` is the product of the library that packed it, which keeps no dense weight for the backward
    pass. `dequantize()` gives the values, and any other operation works on these.
    """

    layer: ref[nn.Module]

    @classmethod
    def held(cls, layer: nn.Module, packed: Tensor) -> QuantizedWeight:
        shape, dtype = cls.facts(packed)
        return cls.of(shape, Seen(0, shape[0], dtype), packed.device, layer=ref(layer))

    @staticmethod
    @abstractmethod
    def holds(packed: Tensor) -> bool:
        """Whether a parameter is packed in this way."""

    @staticmethod
    @abstractmethod
    def facts(packed: Untyped) -> tuple[torch.Size, torch.dtype]:
        """True shape, and type of the values."""

    @abstractmethod
    def multiplied(self, x: Tensor) -> Tensor:
        """`x Wᵀ` as the library's own layer computes it."""

    def dequantize(self) -> Tensor:
        """The values that the bits stand for, as they are seen."""
        return self.formed()

    def times(self, x: Operand, bias: Tensor | None) -> Answer:
        """The libraries take inputs of any type."""
        if self.seen.stop - self.seen.start != self.full[0] or not isinstance(x, Tensor):
            return NotImplemented
        y = self.multiplied(x)
        return y if bias is None else y + bias.to(y.dtype)

    def parts(self) -> tuple[AnyModule, Untyped]:
        """The module, and the parameter as the library keeps it."""
        layer = self.layer()
        assert layer is not None
        return layer, layer._parameters["weight"]

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold the bits and their scales."""
        return (self.parts()[1],)


class FourBits(QuantizedWeight):
    """bitsandbytes' `Params4bit`: NF4 or FP4 in blocks, stored as a column of bytes."""

    @staticmethod
    def holds(packed: Tensor) -> bool:
        return type(packed).__name__ == "Params4bit" and getattr(packed, "quant_state", None) is not None

    @staticmethod
    def facts(packed: Untyped) -> tuple[torch.Size, torch.dtype]:
        return torch.Size(packed.quant_state.shape), packed.quant_state.dtype

    def values(self) -> Tensor:
        _, packed = self.parts()
        found: Tensor = import_module("bitsandbytes.functional").dequantize_4bit(packed.data, packed.quant_state)
        return found

    def multiplied(self, x: Tensor) -> Tensor:
        layer, packed = self.parts()
        wide = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
        found: Tensor = import_module("bitsandbytes").matmul_4bit(wide, packed.t(), quant_state=packed.quant_state)
        return found.to(x.dtype)


class EightBits(QuantizedWeight):
    """bitsandbytes' `Int8Params`: bytes with a scale for each row; outlying inputs are multiplied apart."""

    @staticmethod
    def holds(packed: Tensor) -> bool:
        return type(packed).__name__ == "Int8Params" and packed.dtype == torch.int8

    @staticmethod
    def facts(packed: Untyped) -> tuple[torch.Size, torch.dtype]:
        return packed.shape, torch.float32

    def values(self) -> Tensor:
        layer, packed = self.parts()
        scale = layer.state.SCB if packed.SCB is None else packed.SCB
        found: Tensor = import_module("bitsandbytes.functional").int8_vectorwise_dequant(packed.data, scale)
        return found

    def multiplied(self, x: Tensor) -> Tensor:
        layer, packed = self.parts()
        state = layer.state
        state.is_training = layer.training
        if packed.CB is not None:  # as in the layer's `init_8bit_state`
            state.CB, state.SCB, packed.CB, packed.SCB = packed.CB, packed.SCB, None, None
        found: Tensor = import_module("bitsandbytes").matmul(x, packed, state=state)
        return found.to(x.dtype)


class Torchao(QuantizedWeight):
    """One of torchao's tensors, which know `F.linear` and little else."""

    @staticmethod
    def holds(packed: Tensor) -> bool:
        return type(packed).__module__.startswith("torchao.") and hasattr(packed, "dequantize")

    @staticmethod
    def facts(packed: Untyped) -> tuple[torch.Size, torch.dtype]:
        return packed.shape, packed.dtype

    def values(self) -> Tensor:
        found: Tensor = self.parts()[1].dequantize()
        return found

    def multiplied(self, x: Tensor) -> Tensor:
        return F.linear(x, self.parts()[1])


class Product:
    """The forward of a packed linear that hosts parts: over the weight it reads, packed, merged or trained."""

    def forward(self, x: Tensor) -> Tensor:
        host: AnyModule = self
        return F.linear(x, viewed(host, host.weight), host.bias)


_VIEWS: WeakKeyDictionary[nn.Module, QuantizedWeight] = WeakKeyDictionary()
