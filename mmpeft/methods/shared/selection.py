"""Methods that choose single entries by a score and train those alone: `θ = θ0 + M ⊙ δ`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from mmpeft.controllers.scores import DATA_FREE, Loss, Score, Tensors, check_gradients, default_loss, score
from mmpeft.errors import ConfigError, DataError
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.functional.top_k import top_k_masks
from mmpeft.hosting.host import original_class
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.recipe import tensor_of
from mmpeft.methods.selective.plan import Plan
from mmpeft.methods.shared.plan_file import plan_content
from mmpeft.methods.shared.plan_picture import label_of
from mmpeft.methods.shared.tensors import TensorMethod, elements, group_tied
from mmpeft.sites import Site, sites
from mmpeft.types import Batch


@dataclass(frozen=True)
class EntryMask(TensorMethod):
    """Trains the share `density` of all entries that score highest; subclasses say by which score.

    Candidates are the tensors of the blocks (embeddings and head are not), or what `at` selects. The chosen entries
    are known after `resolve`, which gives a `Plan`; methods that score by data need some. Parameters:
    `round(density · entries)`, by tensor where `scope` is `tensor`.
    """

    density: float = 0.005

    score: ClassVar[Score]
    scope: ClassVar[Literal["global", "tensor"]] = "global"
    matrices: ClassVar[bool] = False
    """Whether vectors (biases, norms) are left out."""
    trains_base: ClassVar[bool] = False

    def check(self, model: nn.Module, available: list[Site]) -> None:
        chosen = self.candidates(model, available)
        if self.needs_data:
            check_gradients([tensor_of(model, path) for path in dict.fromkeys(site.path for site in chosen)])

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"{type(self).__name__}: density is the share that trains, in (0, 1], got {self.density}")

    @property
    def traits(self) -> Traits:
        return replace(super().traits, decided=False, needs_data=self.score not in DATA_FREE)

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        for site in available:
            inside = site.role == "param" and (site.depth >= 0 or bool(self.at))
            if inside and (not self.matrices or tensor_of(model, site.path).dim() > 1):
                yield site

    def candidates(self, model: nn.Module, available: list[Site]) -> list[Site]:
        """One site for every tensor or row slice; a tied tensor counts once."""
        return [group[0] for group in group_tied(model, self.chosen(model, available))]

    def scores(self, model: nn.Module, tensors: Tensors, data: Iterable[Batch], loss: Loss) -> Tensors:
        """Scores of every entry of whole tensors."""
        return score(model, tensors, self.score, data, loss)

    def resolve(self, model: nn.Module, data: Iterable[Batch] = (), loss: Loss = default_loss) -> Plan:
        """Score, select, and write down what was selected; the model is left as it was.

        Raises:
            ConfigError: the budget is below one entry. DataError: scores need data, none was given.
        """
        chosen = self.candidates(model, sites(model))
        budgets = self.budgets(model, chosen)
        tensors = {site.path: tensor_of(model, site.path) for site in chosen}
        found = self.scores(model, tensors, data, loss)
        own = {str(i): take_rows(found[s.path], s.rows, int(s.transposed)) for i, s in enumerate(chosen)}
        if self.scope == "global":
            masks = top_k_masks(own, sum(budgets))
        else:
            masks = {key: top_k_masks({key: own[key]}, k)[key] for (key, k) in zip(own, budgets)}
        whole = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
        for site, mask in zip(chosen, masks.values()):
            before = take_rows(whole[site.path], site.rows, int(site.transposed))
            whole[site.path] = put_rows(whole[site.path], before | mask, site.rows, int(site.transposed))
        sparse = {name: mask.flatten().nonzero().flatten() for name, mask in whole.items() if mask.any()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        several = len({site.tower for site in chosen}) > 1
        units = [
            {
                "label": label_of(site.path),
                "depth": site.depth,
                "tower": site.tower if several else "",
                "vector": mask.dim() == 1,
                "size": mask.numel(),
                "selected": int(mask.sum()),
                "as": "entries" if mask.any() else "",
            }
            for site, mask in zip(chosen, masks.values())
        ]
        return Plan(
            plan_content(
                original_class(model).__name__,
                sparse=sparse,
                shapes=shapes,
                units=units,
                chosen_by=f"{self}",
                score=self.score,
            )
        )

    def budgets(self, model: nn.Module, chosen: list[Site]) -> list[int]:
        """Entries to select of each candidate; under a global scope only the sum counts."""
        sizes = [elements(model, site) for site in chosen]
        if self.scope == "tensor":
            return [max(1, round(self.density * size)) for size in sizes]
        total = round(self.density * sum(sizes))
        if total < 1:
            raise ConfigError(
                f"{type(self).__name__}: density {self.density} of {sum(sizes)} entries is less than one; raise it"
            )
        return [total, *[0] * (len(sizes) - 1)]

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        raise DataError(f"{type(self).__name__} chooses entries first: place the plan that its resolve() gives")

    def count(self, model: nn.Module, available: list[Site]) -> int:
        return sum(self.budgets(model, self.candidates(model, available)))
