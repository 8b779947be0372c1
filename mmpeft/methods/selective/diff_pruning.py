"""Diff pruning: a sparse change of the weights, learned through gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from mmpeft.controllers.diff import DiffSelection
from mmpeft.errors import ConfigError
from mmpeft.functional.rows import put_rows
from mmpeft.hosting.host import original_class
from mmpeft.methods.base import Method, register
from mmpeft.methods.placed import Placed, Tensors
from mmpeft.methods.recipe import positive, rate
from mmpeft.methods.selective.plan import Plan
from mmpeft.methods.shared.plan_file import plan_content
from mmpeft.methods.shared.tensors import TensorMethod, train_tensors
from mmpeft.parts.base import Placement
from mmpeft.parts.diff import Diff
from mmpeft.sites import Site


@register("https://arxiv.org/abs/2012.07463", "selective", mergeable=True)
@dataclass(frozen=True)
class DiffPruning(TensorMethod):
    """`θ = θ0 + z ⊙ w`: values w and hard-concrete gates z(α) of every entry train until the share `until` of the run,
    with `penalty E‖z‖₀` in the loss; then the `density` largest `|z w|` of all stay and train on alone.

    α starts at `start` and is trained as `start + speed a`: one learning rate serves both. `structured` multiplies the
    gates of a tensor by one more. Candidates are the tensors of the blocks, or what `at` selects. The saved adapter is
    a `Plan` of the chosen entries. Parameters while training: two an entry, and one a tensor if structured.
    """

    density: float = 0.005
    structured: bool = False
    penalty: float = 1.25e-7
    start: float = 5.0
    speed: float = 100.0
    until: float = 0.6

    def __post_init__(self) -> None:
        positive(self, density=self.density, speed=self.speed, until=self.until)
        rate(self, until=self.until)
        if self.density > 1:
            raise ConfigError(f"DiffPruning: density is the share that stays, in (0, 1], got {self.density}")

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        return (site for site in available if site.role == "param" and (site.depth >= 0 or bool(self.at)))

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        name = original_class(model).__name__
        make = partial(Diff, start=self.start, speed=self.speed, grouped=self.structured, made_for=name)
        placements = train_tensors("diffpruning", model, self.chosen(model, available), make)
        selection = DiffSelection(_parts(placements), self.penalty, self.until, self._keep(placements))
        return Placed(placements, [selection], partial(self._bake, placements))

    def count(self, model: nn.Module, available: list[Site]) -> int:
        groups = len(self.groups(model, available)) if self.structured else 0
        return 2 * super().count(model, available) + groups

    def _keep(self, placements: Sequence[Placement]) -> int:
        """Entries that stay. Raises ConfigError when that is none."""
        total = sum(part.w.numel() for part in _parts(placements))
        keep = round(self.density * total)
        if keep < 1:
            raise ConfigError(f"DiffPruning: density {self.density} of {total} entries is less than one; raise it")
        return keep

    def _bake(self, placements: Sequence[Placement]) -> tuple[Method, Tensors] | None:
        """Once entries are chosen: a plan of them, with their changes."""
        if any(part.mask is None for part in _parts(placements)):
            return None
        changes: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for p, part in zip(placements, _parts(placements)):
            assert part.mask is not None
            name = f"{p.hooks[0].path}.{p.hooks[0].name}".lstrip(".")
            empty = part.w.new_zeros(part.shape)
            for whole, own in ((changes, part.delta().detach()), (masks, part.mask.to(empty.dtype))):
                whole[name] = put_rows(whole.get(name, empty), own, part.rows, part.dim)
        indices = {name: mask.flatten().nonzero().flatten() for name, mask in masks.items() if mask.any()}
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        made_for = _parts(placements)[0].made_for
        plan = Plan(plan_content(made_for, sparse=indices, shapes=shapes, chosen_by=f"{self}"))
        return plan, [{"delta": changes[name].flatten()[chosen]} for name, chosen in indices.items()]


def _parts(placements: Sequence[Placement]) -> list[Diff]:
    return [p.part for p in placements if isinstance(p.part, Diff)]
