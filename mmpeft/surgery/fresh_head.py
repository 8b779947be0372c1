"""Is the head one that nobody has trained, and does the method leave it so?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mmpeft.hosting.host import base_value, original_class
from mmpeft.hosting.modules import CHILD, module_at, own_modules
from mmpeft.hosting.quantized import QuantizedWeight
from mmpeft.methods.base import Method
from mmpeft.parts.base import Placement
from mmpeft.sites import Site

ENOUGH = 256
"""Entries of a weight from which the shape of their distribution says something."""


def fresh_head(
    model: nn.Module, available: Iterable[Site], method: Method, placements: Sequence[Placement] = ()
) -> str:
    """Why a frozen head deserves a warning, with the cure; empty where it is trained, or looks as if it had been.

    `placements` are those of the method, where they are known: what acts at a head trains it.
    """
    paths = list(dict.fromkeys(site.path for site in available if site.role == "head"))
    acting = {hook.path for placement in placements for hook in placement.hooks}
    if any(_shared(model, module) for path in paths for _, module in _layers(model, path)):
        return ""  # scores of words, by the table that the base was trained with
    for path in paths:
        trained = any(f"{own}.".startswith(f"{path}.") for own in acting) if placements else method.trains_head
        why = "" if trained else _untrained(model, path)
        if why:
            return (
                f"the head {path!r} of {original_class(model).__name__} looks fresh ({why}) and {method} leaves it "
                "frozen: its scores stay those of a random start. Train it: attach(model, method, train_head=True), or "
                "method + mmpeft.LinearProbe(); or load its trained weights first"
            )
    return ""


def _layers(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """A head's modules with a weight that multiplies, by name."""
    return [
        (f"{path}.{name}".rstrip("."), module)
        for name, module in module_at(model, path).named_modules()
        if CHILD not in name.split(".")
        and module._parameters.get("weight") is not None
        and _plain(base_value(module, "weight"))
    ]


def _untrained(model: nn.Module, path: str) -> str:
    """What shows that a head's last layer is as it was made; empty for one that may have been trained."""
    layers = _layers(model, path)
    if not layers:
        return ""
    name, module = layers[-1]
    weight: Tensor = base_value(module, "weight").detach()
    bias: Tensor | None = module._parameters.get("bias")
    if not weight.any():
        return f"the weight of {name!r} is all zero"
    if bias is None:
        return ""
    if not bias.detach().any():
        return f"the bias of {name!r} is all zero"
    bound = weight[0].numel() ** -0.5
    if _as_made(weight, bound) and bias.detach().abs().max() <= bound:
        return f"the values of {name!r} are spread evenly up to 1/√{weight[0].numel()}, as PyTorch makes a layer"
    return ""


def _plain(weight: Tensor) -> bool:
    known = isinstance(weight, QuantizedWeight) or weight.is_meta or not weight.is_floating_point()
    return weight.dim() > 1 and not known


def _as_made(weight: Tensor, bound: float) -> bool:
    """Whether entries are uniform in ±bound: none beyond, the largest near it, as wide as such a distribution is."""
    if weight.numel() < ENOUGH:
        return False
    size = weight.float()
    top, spread = float(size.abs().max()), float(size.std()) * 3**0.5
    tolerance = 4 * weight.numel() ** -0.5  # of the spread, about nine standard errors
    return 0.95 * bound <= top <= bound * (1 + 2**-7) and abs(spread / bound - 1) < tolerance


def _shared(model: nn.Module, head: nn.Module) -> bool:
    """Whether the weight is also that of another module: a table of words, trained with the base."""
    own = head._parameters["weight"]
    owners = (m for _, m in own_modules(model) if any(p is own for p in m._parameters.values()))
    return sum(1 for _ in owners) > 1
