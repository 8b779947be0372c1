"""A tree of linears, convolutions, norms and embeddings over named tensors: what loaders look for layers in."""

from __future__ import annotations

from typing import Any


def tree(tensors: dict[str, Any], classes: dict[str, str] | None = None) -> Any:
    """Modules by the tensors' names; `classes` gives class names to containers by path."""
    from torch import nn

    root = nn.Module()
    owners: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owners.setdefault(path, {})[last] = tensor
    for path, own in owners.items():
        parent = root
        *above, last = path.split(".") if path else [""]
        for i, step in enumerate(above):
            if step not in parent._modules:
                made = (classes or {}).get(".".join(above[: i + 1]), "Module")
                parent.add_module(step, type(made, (nn.Module,), {})())
            parent = parent._modules[step]  # type: ignore[assignment]
        if not path:
            continue
        leaf = _leaf(own)
        known = parent._modules.get(last)
        if known is not None:
            for name, child in known._modules.items():
                leaf.add_module(name, child)
        parent.add_module(last, leaf)
    return root


def _leaf(own: dict[str, Any]) -> Any:
    from torch import nn

    weight, bias = own.get("weight"), own.get("bias")
    if weight is not None and weight.dim() == 2:
        made: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    elif weight is not None and weight.dim() == 4:
        made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=bias is not None)
    elif weight is not None and weight.dim() == 1:
        made = nn.LayerNorm(len(weight), bias=bias is not None)
    else:
        made = nn.Module()
    for name, tensor in own.items():
        if tensor.is_floating_point():
            made.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    return made
