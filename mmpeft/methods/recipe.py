"""What recipes ask of a model: its tensors, widths, places for parts; and how they check their own fields."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

from mmpeft.errors import expect
from mmpeft.functional.rows import count_rows, turned
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at
from mmpeft.hosting.offload import fetched, same_tensor
from mmpeft.sites import Site


def tensor_of(model: nn.Module, path: str) -> Tensor:
    """A named parameter or buffer of the backbone itself, whatever parts read it."""
    owner, _, name = path.rpartition(".")
    value = base_value(module_at(model, owner), name)
    assert isinstance(value, Tensor)
    return value


def identity(model: nn.Module, path: str) -> Hashable:
    """What the names of one tensor have in common; `tensor_of` may answer with a new object at each call."""
    owner, _, name = path.rpartition(".")
    return same_tensor(module_at(model, owner), name)


def own_weight(model: nn.Module, site: Site) -> Tensor:
    """The weight [o, i, ...] of a linear, convolution or embedding site, all rows of it; of experts [experts, o, i]."""
    weight = tensor_of(model, f"{site.path}.{site.tensor}")
    if not site.transposed:
        return weight
    return weight.mT if site.kind == "experts" else turned(weight)


def fan(model: nn.Module, site: Site) -> tuple[int, int]:
    """(output rows, inputs per row) of a linear or convolution site or of each expert, its `rows` slice alone."""
    weight = own_weight(model, site)
    weight = weight[0] if site.kind == "experts" else weight
    return count_rows(site.rows, len(weight)), weight[0].numel()


def home_of(model: nn.Module, path: str) -> str:
    """Where a part that enters at `path` is registered: there, or above it if that is a container of its entries."""
    while isinstance(module_at(model, path), nn.Sequential | nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return path


def any_tensor(model: nn.Module, site: Site) -> Tensor:
    """A tensor of the site's module (or of the model) that says device and type."""
    own = first_tensor(module_at(model, site.path))
    found = first_tensor(model) if own is None else own
    assert found is not None
    return found


def first_tensor(module: nn.Module) -> Tensor | None:
    """The first parameter under a module, from where accelerate holds it; None without any."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                found: Tensor = fetched(owner, name, parameter)
                return found
    return None


def positive(method: object, **values: float | None) -> None:
    """Raise ConfigError unless every value given is positive."""
    for name, value in values.items():
        expect(value is None or value > 0, method, name, value, "positive")


def rate(method: object, **values: float) -> None:
    """Raise ConfigError unless every value is a probability below one."""
    for name, value in values.items():
        expect(0 <= value < 1, method, name, value, "in [0, 1)")
