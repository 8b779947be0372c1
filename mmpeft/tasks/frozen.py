"""What does not train: it stays in evaluation mode, and out of state dicts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from mmpeft.sites import Site
from mmpeft.types import StateDict


def frozen_towers(model: nn.Module, blocks: Sequence[Site], homes: Collection[str]) -> list[nn.Module]:
    """The modules that hold towers of which nothing trains, each with all that belongs to that tower alone.

    A tower that has parts is not one of them: statistics (`BatchStatistics`) move without a gradient. `homes` are the
    modules that parts stand in.
    """

    def is_frozen(path: str) -> bool:
        inside = any(not path or home == path or home.startswith(f"{path}.") for home in homes)
        return not inside and not any(p.requires_grad for p in model.get_submodule(path).parameters())

    if is_frozen(""):
        return [model]
    found = []
    for tower in {block.tower: None for block in blocks}:
        others = [block.path for block in blocks if block.tower != tower]
        path = next(block.path for block in blocks if block.tower == tower)
        while path:
            above = path.rpartition(".")[0]
            if others and (not above or any(other.startswith(f"{above}.") for other in others)):
                break
            path = above
        if is_frozen(path):
            found.append(model.get_submodule(path))
    return found


def _frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def drop_frozen(module: nn.Module, state_dict: StateDict, prefix: str, local_metadata: object) -> None:
    """Leave the frozen base out of every state dict, also of one gathered through a parent such as AveragedModel."""
    for name in _frozen(module):
        state_dict.pop(prefix + name, None)


def lend_frozen(module: nn.Module, state_dict: StateDict, prefix: str, *rest: object) -> None:
    """Hand PyTorch's strict loading the frozen tensors that no checkpoint holds: each is copied onto itself."""
    for name, parameter in _frozen(module).items():
        state_dict.setdefault(prefix + name, parameter)
