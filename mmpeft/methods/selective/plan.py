"""`Plan`: a method that a file describes site by site, tensor by tensor, entry by entry."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.files import write_atomic
from mmpeft.methods.base import Method, Sited, register
from mmpeft.methods.former import place
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.recipe import tensor_of
from mmpeft.methods.shared.plan_file import read_plan, unpack
from mmpeft.methods.shared.plan_picture import draw_plan
from mmpeft.methods.shared.tensors import elements, group_tied, place_entries, train_tensors
from mmpeft.methods.spec import from_spec
from mmpeft.sites import Site
from mmpeft.types import Facts, Json


@register("https://arxiv.org/abs/2303.08566", "selective", mergeable=True)
@dataclass(frozen=True)
class Plan(Method):
    """Modules at chosen sites, chosen tensors whole, and `θ0 + M ⊙ δ` on chosen entries of others.

    `plan` is the path of a JSON file, or its content. `mmpeft.allocate` makes plans; the mask methods are plans too.
    Parameters: those of the modules, plus the elements of the whole tensors, plus the chosen entries.
    """

    plan: str | Facts

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", read_plan(self.plan))

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        kinds = f"{len(self._modules())} modules, {len(self.content['whole'])} whole tensors"
        entries = sum(entry["count"] for entry in self.content["sparse"].values())
        return f"Plan({kinds}, {entries:,} entries)"

    @property
    def content(self) -> Json:
        assert isinstance(self.plan, dict)
        return self.plan

    @property
    def traits(self) -> Traits:
        inside = Traits.of_all([from_spec(group["method"]) for group in self.content["structured"]])
        return replace(super().traits, mergeable=inside.mergeable, identity=inside.identity)

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, atomically."""
        write_atomic(Path(path), (json.dumps(self.content, indent=1) + "\n").encode())
        return Path(path)

    def draw(self, path: str | Path) -> Path:
        """Write a picture (PNG) of which layers and roles got what."""
        entries = sum(entry["count"] for entry in self.content["sparse"].values())
        parts = {
            "modules": len(self._modules()),
            "whole tensors": len(self.content["whole"]),
            "single entries": entries,
        }
        title = f"{self.content['model']}: " + ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
        write_atomic(Path(path), draw_plan(self.content.get("units", ()), title))
        return Path(path)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placements = [p for method in self._methods(available) for p in place(method, model, available)]
        placements += train_tensors("plan", model, self._whole(available))
        placements += place_entries("plan", model, available, self._entries(model, available))
        if not placements:
            raise ConfigError("the plan is empty: it trains nothing")
        return Placed(placements)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        structured = sum(method.count(model, available) for method in self._methods(available))
        whole = sum(elements(model, group[0]) for group in group_tied(model, self._whole(available)))
        return structured + whole + sum(int(entry["count"]) for entry in self.content["sparse"].values())

    def _modules(self) -> list[tuple[str, str]]:
        return [(path, role) for group in self.content["structured"] for path, role in group["sites"]]

    def _methods(self, available: list[Site]) -> list[Method]:
        """Each structured method, at its own sites of this model."""
        methods: list[Method] = []
        known = {(site.path, site.role) for site in available}
        for group in self.content["structured"]:
            wanted = {(path, role) for path, role in group["sites"]}
            if wanted - known:
                raise self._foreign(f"{len(wanted - known)} sites, such as {min(wanted - known)}")
            method = from_spec(group["method"])
            if not isinstance(method, Sited):
                raise AdapterFileError(f"the plan puts {method} at sites, which is no method of sites")
            methods.append(replace(method, at=_Among(frozenset(wanted))))
        return methods

    def _whole(self, available: list[Site]) -> list[Site]:
        params = {site.path: site for site in available if site.role == "param"}
        for name in self.content["whole"]:
            if name not in params:
                raise self._foreign(f"the tensor {name!r}")
        return [params[name] for name in self.content["whole"]]

    def _entries(self, model: nn.Module, available: list[Site]) -> dict[str, Tensor]:
        params = {site.path for site in available if site.role == "param"}
        for name, entry in self.content["sparse"].items():
            if name not in params:
                raise self._foreign(f"the tensor {name!r}")
            shape = list(tensor_of(model, name).shape)
            if shape != entry["shape"]:
                raise self._foreign(f"{name} of shape {entry['shape']}, here it is {shape},")
        return {
            name: unpack(entry["indices"], entry["count"], math.prod(entry["shape"]))
            for name, entry in self.content["sparse"].items()
        }

    def _foreign(self, what: str) -> AdapterFileError:
        return AdapterFileError(
            f"the plan was made for {self.content['model']} and names {what}, which this model does not have; "
            "allocate one for this model"
        )


@dataclass(frozen=True)
class _Among:
    """A predicate: sites of these paths and roles."""

    wanted: frozenset[tuple[str, str]]

    def __call__(self, site: Site) -> bool:
        return (site.path, site.role) in self.wanted
