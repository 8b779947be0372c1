"""Walking the modules of a backbone, past the parts of tunings that hang under them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

CHILD = "mmpeft"
"""The name under which a module holds the parts that it hosts."""

SEAT = "_mmpeft_seat"
"""The attribute by which a host knows its place among those of its model."""


def own_modules(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without the parts of tunings and what holds them."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != CHILD:
            yield from own_modules(child, f"{path}.{name}" if path else name, seen)


def own_parameters(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Every name of every parameter of the backbone: one that two modules share has two."""
    for name, parameter in model._parameters.items():
        if parameter is not None:
            yield f"{path}.{name}" if path else name, parameter
    for name, child in model._modules.items():
        if child is not None and name != CHILD:
            yield from own_parameters(child, f"{path}.{name}" if path else name)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)` through the modules' own tables: attaching asks for hundreds."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]  # the path exists
    return model
