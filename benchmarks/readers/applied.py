"""What A1111's network classes, and those made after them, add to modules."""

from __future__ import annotations

from typing import Any


def apply(networks: dict[str, Any]) -> None:
    """Each network's own difference, into the module that it was matched to, as these programs add them."""
    import torch
    from torch import nn

    with torch.no_grad():
        for key, network in networks.items():
            module = network.sd_module
            if isinstance(module, nn.MultiheadAttention) and not key.endswith("out_proj"):
                place = "qkv".index(key[-len("q_proj")])
                weight = module.in_proj_weight.chunk(3)[place]
            else:
                module = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
                weight = module.weight
            change, bias = network.calc_updown(weight)
            weight += change.view(weight.shape)
            if bias is not None:
                module.bias += bias.view(module.bias.shape)
