"""A copy of a model's modules that can be run without the model noticing: on tensors without data, or on its own."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from types import CellType, FunctionType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpeft.hosting.host import base_value, is_host, original_class, unmake_host
from mmpeft.hosting.modules import own_modules
from mmpeft.hosting.quantized import QuantizedWeight, packs
from mmpeft.types import Untyped


def shadow_of(model: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """The modules of a model as their library wrote them, in evaluation mode, on tensors without data or on its own.

    The pass may leave anything behind in them: masks, caches, buffers that grow.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        if packs(type(module)) or _holds_quantized(module):
            memo[id(module)] = _unpacked(module, fake)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and (fake or isinstance(tensor, nn.Parameter)):
                memo[id(tensor)] = faked(tensor, fake) if fake else tensor
        for value in module.__dict__.values():
            if type(value).__module__.startswith("mmpeft.") and not isinstance(value, nn.Module):
                memo[id(value)] = value  # what is known of a tuned model is not the copy's
            elif isinstance(value, Tensor) and fake:
                memo[id(value)] = faked(value, fake)
    shadow: nn.Module = copy.deepcopy(model, memo)
    for _, module in own_modules(shadow):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not _is_own(hook, original_class(module)):
                    del hooks[key]
        if is_host(module):
            unmake_host(module)
        if type(module).forward is not nn.Module.forward:  # else the class chose one for each of its instances
            module.__dict__.pop("forward", None)
    shadow.eval()
    for _, module in own_modules(shadow):
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            module.training = True  # in evaluation mode they take a fused path, which hides the products
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
    return shadow


def _is_own(hook: object, cls: type) -> bool:
    """Whether a hook is a part of the module: it computes a weight, or its library gathers results by it."""
    home = getattr(hook, "__module__", type(hook).__module__)
    library = cls.__module__.partition(".")[0]
    return home.startswith("torch.nn.utils") or library == home.partition(".")[0] != "__main__"


def faked(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    """A tensor of the same shape and type without data, on the CPU: a model's tensors may be anywhere."""
    with fake:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _holds_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and isinstance(base_value(module, "weight"), QuantizedWeight)


def _unpacked(module: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """A linear in place of one whose weight is quantised."""
    rows, columns = base_value(module, "weight").shape
    bias = module._parameters.get("bias")
    with fake or nullcontext():
        return nn.Linear(columns, rows, bias is not None, dtype=torch.float32 if bias is None else bias.dtype)


def cached_by(model: nn.Module) -> dict[Untyped, int]:
    """Functions of the model's own code that keep what they gave, and how often they had to make it."""
    homes = {cls.__module__ for _, module in own_modules(model) for cls in type(module).__mro__}
    found: dict[Untyped, int] = {}
    for home in homes - {"torch.nn.modules.module", "builtins"}:
        values = list(vars(sys.modules[home]).values()) if home in sys.modules else []
        inner = [v for cls in values if isinstance(cls, type) and cls.__module__ == home for v in vars(cls).values()]
        for function in map(_cached, (*values, *inner)):
            if function is not None:
                found[function] = function.cache_info().misses
    return found


def _cached(value: object) -> Untyped:
    """The function that keeps what it gave: the value itself, or what a plain function around it calls."""
    function = getattr(value, "__func__", value)
    cells = (function.__closure__ or ()) if isinstance(function, FunctionType) else ()
    held = [function, *(cell.cell_contents for cell in cells if cell != CellType())]
    return next((one for one in held if hasattr(one, "cache_info") and hasattr(one, "cache_clear")), None)
