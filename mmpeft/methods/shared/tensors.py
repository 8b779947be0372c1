"""Methods that train whole named tensors: how they are chosen and placed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused, SiteError
from mmpeft.functional.rows import Rows, take_rows
from mmpeft.hosting.quantized import QuantizedWeight
from mmpeft.methods.base import Method
from mmpeft.methods.needs import lacking
from mmpeft.methods.placed import Placed
from mmpeft.methods.recipe import identity, tensor_of
from mmpeft.parts import Mask, Sparse
from mmpeft.parts.base import Hook, Part, Placement
from mmpeft.sites import Selector, Site
from mmpeft.sites.selector import roles_of, select


@dataclass(frozen=True)
class TensorMethod(Method):
    """Trains every tensor that `tensors` names; parameters: their elements.

    `at` restricts to the tensors of matching sites (`at="attn.q"` takes the rows of a fused projection) or to
    `param` sites themselves (`at="path=blocks.0.*"`); empty for the whole model.
    """

    at: Selector = ""

    trains_base: ClassVar[bool] = True
    """Whether the tensors train as they are, which those quantised cannot."""

    def check(self, model: nn.Module, available: list[Site]) -> None:
        chosen = self.chosen(model, available)
        if self.trains_base:
            check_bits(model, chosen)

    @abstractmethod
    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        """The `param` sites to train, before `at` restricts them."""

    def found(self, model: nn.Module, available: list[Site]) -> list[Site]:
        """The `param` sites to train after `at` has restricted them; may be empty."""
        tensors = list(self.tensors(model, available))
        return list(_restrict(tensors, select(available, self.at))) if self.at else tensors

    def chosen(self, model: nn.Module, available: list[Site]) -> list[Site]:
        """As `found`. Raises SiteError when there is nothing to train."""
        for need in self.needs:
            need.check(type(self).__name__, available)
        found = self.found(model, available)
        if not found:
            raise self.nothing(available)
        return found

    def nothing(self, available: Iterable[Site]) -> SiteError:
        """The error for a model without a tensor of this method's kind."""
        where = f" in what at={self.at!r} selects" if self.at else ""
        return lacking(
            type(self).__name__, "tensors of its kind", f"there is none{where}; roles here: {roles_of(available)}"
        )

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        return Placed(train_tensors(type(self).__name__.lower(), model, self.chosen(model, available)))

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(elements(model, group[0]) for group in self.groups(model, available))

    def groups(self, model: nn.Module, available: list[Site]) -> list[list[Site]]:
        """The chosen names, those of one tensor together."""
        return group_tied(model, self.chosen(model, available))


def group_tied(model: nn.Module, chosen: Iterable[Site]) -> list[list[Site]]:
    """The chosen names by tensor: names of one tensor that are chosen together stay tied."""
    groups: dict[tuple[Hashable, Rows | None], list[Site]] = {}
    for site in chosen:
        groups.setdefault((identity(model, site.path), site.rows), []).append(site)
    return list(groups.values())


def train_tensors(
    method: str, model: nn.Module, chosen: Iterable[Site], make: Callable[..., Part] = Mask
) -> list[Placement]:
    """A `Mask`, or what `make` makes, on each tensor or the rows that a site owns of it, wherever it is read."""
    return [_train(method, model, group, make) for group in group_tied(model, chosen)]


def _train(method: str, model: nn.Module, group: list[Site], make: Callable[..., Part]) -> Placement:
    site = group[0]
    home, _, name = site.path.rpartition(".")
    check_bits(model, group)
    tensor = tensor_of(model, site.path)
    part = make(tensor, rows=site.rows, dim=int(site.transposed))
    key = f"{method}_{name}" + (f"_{site.rows[0]}" if site.rows else "")
    owners = [site.path.rpartition(".") for site in group]
    hooks = tuple(Hook(path, "read", tensor) for path, _, tensor in owners)
    return Placement(part, home, key, hooks, "param")


def check_bits(model: nn.Module, chosen: Iterable[Site]) -> None:
    """Raise Refused for a tensor that is quantised, which cannot be trained as it is."""
    for site in chosen:
        if isinstance(tensor_of(model, site.path), QuantizedWeight):
            raise Refused(
                f"{site.path} is quantised and cannot be trained as a whole: leave it out with `at`, or tune it "
                "by a method that adds to it, such as LoRA"
            )


def place_entries(
    method: str, model: nn.Module, available: list[Site], chosen: Mapping[str, Tensor]
) -> list[Placement]:
    """A `Sparse` part on the flat indices chosen of each tensor, under every name the tensor is read by.

    A linear that is called gets the update of its output; whatever else reads the tensor reads the sum.
    """
    called = {f"{s.path}.weight": s for s in available if s.kind == "linear" and s.via == "call"}
    names: dict[Hashable, list[str]] = {}
    for site in available:
        if site.role == "param":
            names.setdefault(identity(model, site.path), []).append(site.path)
    placements = []
    for path, indices in chosen.items():
        tensor = tensor_of(model, path)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < tensor.numel():
            raise ConfigError(f"{path} has {tensor.numel()} entries, the indices go up to {int(indices.max())}")
        hooks = []
        for name in names[identity(model, path)]:
            owner, _, attribute = name.rpartition(".")
            hooks.append(Hook(owner, "exit") if name in called else Hook(owner, "read", attribute))
        transposed = any(called[name].transposed for name in names[identity(model, path)] if name in called)
        home, _, label = path.rpartition(".")
        part = Sparse(tensor, indices, any(hook.kind == "exit" for hook in hooks), transposed)
        placements.append(Placement(part, home, f"{method}_{label}_entries", tuple(hooks), "param"))
    return placements


def elements(model: nn.Module, site: Site) -> int:
    """Elements of a `param` site, its row slice alone."""
    tensor = tensor_of(model, site.path)
    return take_rows(tensor, site.rows, int(site.transposed)).numel()


def _restrict(tensors: Iterable[Site], within: list[Site]) -> Iterable[Site]:
    """Tensors inside the selected sites: by module, by row slice of a fused module, or by name."""
    for tensor in tensors:
        owner = tensor.path.rpartition(".")[0]
        for site in within:
            if site.path == tensor.path and site.role == "param":
                yield tensor
                break
            if site.role == "param":
                continue
            if site.path == owner or site.bias == tensor.path:
                # a bias outside the fused module is the site's alone
                whole = site.rows is None or (site.bias == tensor.path and site.path != owner)
                matrix = site.transposed and tensor.path.endswith(f".{site.tensor}")
                yield tensor if whole else replace(tensor, rows=site.rows, transposed=matrix)
                if whole:
                    break
            elif site.kind == "module" and tensor.path.startswith(site.path + "."):
                yield tensor
                break
