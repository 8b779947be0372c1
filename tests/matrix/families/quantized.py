"""A tiny Llama whose linears are quantised, by each library that holds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import bitsandbytes as bnb
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.matrix.example import Example
from tests.matrix.families import transformers


def _inside(name: str) -> bool:
    return ".layers." in name


def torchao(model: nn.Module, within: Callable[[str], bool] = _inside) -> None:
    """Hold linears in torchao's eight bits."""
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and within(name))
    for module in model.modules():
        module.__dict__.pop("extra_repr", None)  # a bound partial, which no copy or pickle survives


def pack(model: nn.Module, bits: int, within: Callable[[str], bool] = _inside) -> None:
    """Put bitsandbytes' layers in the place of linears, packed, as its users' loaders do."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and within(name):
            sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
            if bits == 4:
                packed = bnb.nn.Linear4bit(*sizes, bias, compute_dtype=torch.float32, quant_type="nf4")
                packed.support_avx512bf16_for_cpu = False  # which repacks for inference alone, and not these sizes
            else:
                packed = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
            packed.load_state_dict(linear.state_dict())
            packed.requires_grad_(False)
            model.set_submodule(name, packed.to("cpu").train(linear.training))


def _held(hold: Callable[[nn.Module], None]) -> Example:
    example = transformers.FAMILIES["llama"]()
    hold(example.model)
    return example


FAMILIES: dict[str, Callable[[], Example]] = {
    "llama_torchao8": partial(_held, torchao),
    "llama_bnb4": partial(_held, partial(pack, bits=4)),
    "llama_bnb8": partial(_held, partial(pack, bits=8)),
}
