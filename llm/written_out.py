"""Attentions that do not ask transformers' registry: tried on tensors without data, so as to know what they compute."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.hosting.host import original_class
from mmpeft.hosting.modules import CHILD
from mmpeft.parts.attention import attend, attentions

cosine = partial(attend, keyed=partial(F.normalize, dim=-1))
"""For scores that are cosines: learned keys are normalised as the module's own are (Swin V2)."""

_TRIED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_LENGTHS = (8, 12)
"""Of the trial's text: two, so that what happens to fit one length (a few landmarks) is no proof."""


def refusal(module: nn.Module, width: int, across: int = 0) -> str:
    """Why learned keys cannot enter an attention, or nothing: it must compute one `softmax(q kᵀ) v` over all its keys.

    `width` is that of the states it reads, `across` that of the others in cross-attention.
    """
    if module not in _TRIED:
        _TRIED[module] = _try(module, width, across)
    return _TRIED[module]


def _try(module: nn.Module, width: int, across: int) -> str:
    name = original_class(module).__name__
    shadow = hollow(module)
    window = getattr(module, "window_size", None)
    area = [int(window[0]) * int(window[1])] if isinstance(window, tuple | list) and len(window) == 2 else []
    for length in area or _LENGTHS:
        states = torch.empty(1, length, width, device="meta")
        given: dict[str, Any] = {}
        for parameter in list(inspect.signature(original_class(module).forward).parameters.values())[1:]:
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                given[parameter.name] = states
            elif across and parameter.name == "encoder_hidden_states":
                given[parameter.name] = torch.empty(1, length, across, device="meta")
        try:
            with torch.no_grad():
                found = attentions(shadow.forward, **given)
        except Exception as error:  # any: the module's own code on a trial that may not suit it
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            return f"{name} asks no registry of attention functions, and a trial of it alone failed ({reason})"
        if found != 1:
            return f"{name} computes no single softmax over all its keys, which learned ones could enter"
    return ""


def hollow(module: nn.Module) -> nn.Module:
    """A module as its library wrote it, in evaluation mode, without data, hooks and parts."""
    cls = original_class(module)
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    copy = cls.__new__(cls)
    nn.Module.__init__(copy)
    for name, value in module.__dict__.items():
        if not name.startswith("_") and name != "forward":
            copy.__dict__[name] = value.to("meta") if isinstance(value, Tensor) else value
    copy.training = False
    for own, theirs in ((copy._parameters, module._parameters), (copy._buffers, module._buffers)):
        own.update({n: None if t is None else torch.empty_like(t, device="meta") for n, t in theirs.items()})
    copy._modules.update({n: None if m is None else hollow(m) for n, m in module._modules.items() if n != CHILD})
    return copy
