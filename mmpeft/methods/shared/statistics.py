"""Methods that also move the running statistics of what they train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.errors import SiteError
from mmpeft.hosting.modules import CHILD, module_at
from mmpeft.hosting.still import frozen_statistics
from mmpeft.methods.base import Method, MethodInfo
from mmpeft.methods.placed import Placed
from mmpeft.methods.shared.tensors import TensorMethod
from mmpeft.parts.statistics import place
from mmpeft.sites import Selector, Site
from mmpeft.sites.selector import select


@dataclass(frozen=True)
class WholeModules(TensorMethod):
    """Trains every tensor of some modules, so that the statistics of norms in them are theirs and follow the data."""

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        statistics = [place(model, path) for path in _whole(model, self.chosen(model, available))]
        return Placed([*super().place(model, available), *statistics])


def _whole(model: nn.Module, chosen: Iterable[Site]) -> list[str]:
    """Norms with statistics of which every tensor is chosen; of one without, every tensor of what is around it."""
    names = {site.path for site in chosen if site.rows is None}

    def tensors(path: str) -> list[str]:
        own = module_at(model, path).named_parameters(path, remove_duplicate=False)
        return [name for name, _ in own if CHILD not in name.split(".")]

    found = []
    for path in frozen_statistics(model):
        around = path
        while around and not tensors(around):
            around = around.rpartition(".")[0]
        if set(tensors(around)) <= names:
            found.append(path)
    return found


@dataclass(frozen=True)
class BatchStatistics(Method):
    """Running statistics of batch and instance norms follow the training data, no weight does (AdaBN, 1603.04779).

    Beside another method (`LoRA() + BatchStatistics()`) norms then normalise by the batch while training. The
    statistics are in the adapter's file, the base keeps its own. `at` restricts to norms in the selected sites, or to
    norms one of whose tensors is selected; empty for the whole model. Parameters: none.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        "BatchStatistics", "https://arxiv.org/abs/1603.04779", "selective", mergeable=True, identity=True
    )
    at: Selector = ""

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        paths = frozen_statistics(model)
        if self.at:
            sites = select(available, self.at)
            within = {site.path.rpartition(".")[0] if site.role == "param" else site.path for site in sites}
            paths = [path for path in paths if any(f"{path}.".startswith(f"{own}.") for own in within)]
        if not paths:
            where = f" at {self.at!r}" if self.at else ""
            raise SiteError(f"BatchStatistics finds no norm with running statistics{where} in {type(model).__name__}")
        return Placed([place(model, path) for path in paths])

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return 0
