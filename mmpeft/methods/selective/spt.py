"""SPT: sensitivity decides which sites get a module, which vectors train whole, and which entries train alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mmpeft.controllers.scores import SCORES, Loss, Score, Tensors, check_gradients, default_loss, score
from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.functional.rows import Rows, put_rows, take_rows
from mmpeft.functional.top_k import BITS
from mmpeft.hosting.host import original_class
from mmpeft.methods.base import Method, Sited, register
from mmpeft.methods.placed import Placed, Traits
from mmpeft.methods.recipe import identity, positive, tensor_of
from mmpeft.methods.reparameterized.lora import LoRA
from mmpeft.methods.selective.plan import Plan
from mmpeft.methods.shared.plan_file import plan_content
from mmpeft.methods.shared.plan_picture import label_of
from mmpeft.methods.spec import to_spec
from mmpeft.sites import Site, sites
from mmpeft.sites.selector import select
from mmpeft.types import Argument, Batch, Json, Kwargs


@register("https://arxiv.org/abs/2303.08566", "selective", mergeable=True)
@dataclass(frozen=True)
class SPT(Method):
    """Spends `budget` trainable parameters where `s = Σ_batches (∂L/∂w)²` is largest (He et al. 2023).

    The τ entries of highest sensitivity are selected over all candidates. A site of `structured` becomes a module when
    at least `cost / alpha` of its entries are among them; a vector of n entries trains whole from `n / beta` on; all
    other selected entries train alone (`entries=False` drops those). τ is the largest that keeps within the budget.
    `budget` is a number, `"0.2M"`, or a share of the model such as `"0.5%"`.
    """

    budget: float | str = "0.2M"
    structured: Sequence[Method] | Method | None = field(default_factory=lambda: LoRA(rank=8, at="{attn,cross,mlp}.*"))
    at: str = "param & depth>=0"
    score: Score = "gradient2"
    batches: int | None = 16
    alpha: float = 10.0
    beta: float = 5.0
    entries: bool = True

    def __post_init__(self) -> None:
        positive(self, alpha=self.alpha, beta=self.beta, batches=self.batches)
        if self.score not in SCORES:
            raise ConfigError(
                f"SPT: unknown score {self.score!r}; known: {', '.join(SCORES)}.{nearest(self.score, SCORES)}"
            )
        for method in self.modules:
            if not isinstance(method, Sited):
                raise ConfigError(f"SPT: structured takes methods with an at=, such as LoRA, got {method!r}")

    @property
    def modules(self) -> tuple[Method, ...]:
        if self.structured is None:
            return ()
        return (self.structured,) if isinstance(self.structured, Method) else tuple(self.structured)

    @property
    def traits(self) -> Traits:
        inside = Traits.of_all(self.modules)
        own = super().traits
        return replace(own, mergeable=inside.mergeable, identity=inside.identity, decided=False, needs_data=True)

    def check(self, model: nn.Module, available: list[Site]) -> None:
        for method in self.modules:
            assert isinstance(method, Sited)
            method.named(available)
        check_gradients(list(self._candidates(model, available).values()))

    def _candidates(self, model: nn.Module, available: list[Site]) -> Tensors:
        """The tensors that may train, by name; a tied one once."""
        names = [site.path for site in select(available, self.at) if site.role == "param"]
        first = {identity(model, name): name for name in reversed(names)}
        return {name: tensor_of(model, name) for name in names if first[identity(model, name)] == name}

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        raise DataError("SPT allocates by data: mmpeft.allocate(model, loader, ...), or attach(..., data=loader)")

    def count(self, model: nn.Module, available: list[Site]) -> int:
        raise DataError("SPT: how much is spent is known after mmpeft.allocate(...)")

    def resolve(self, model: nn.Module, data: Iterable[Batch] = (), loss: Loss = default_loss) -> Plan:
        """Score, allocate, and write down what was allocated.

        Raises:
            ConfigError: the budget is smaller than anything selectable. DataError: an empty scoring set.
        """
        available = sites(model)
        budget = parse_budget(self.budget, sum(p.numel() for p in model.parameters()))
        tensors = self._candidates(model, available)
        scores = score(model, tensors, self.score, data, loss, self.batches)
        units = self._units(model, available, tensors)
        for unit in units:
            unit.read(scores)
        threshold = self._threshold(units, budget)
        content = self._content(model, units, threshold, scores)
        if content["trainable"] == 0:
            cheapest = min(unit.cost for unit in units)
            raise ConfigError(f"SPT: a budget of {budget} is smaller than anything selectable (from {cheapest} on)")
        return Plan({**content, "budget": budget, "score": self.score})

    def _units(self, model: nn.Module, available: list[Site], tensors: dict[str, Tensor]) -> list[_Unit]:
        """Modules to be had, vectors, and what is left of the matrices: together every candidate entry once."""
        pieces = _pieces(available, tensors)
        units, taken = [], set()
        for number, method in enumerate(self.modules):
            assert isinstance(method, Sited)
            for site in method.named(available):
                if site.refuse or (method.takes and site.kind not in method.takes):
                    continue
                own = [p for p in pieces if p.inside(site) and p not in taken]
                if own:
                    cost = replace(method, at=_Only(site)).count(model, available)
                    units.append(_Unit(own, cost, cost / self.alpha, (number, site)))
                    taken.update(own)
        for piece in pieces:
            if piece not in taken:
                vector = tensors[piece.name].dim() == 1
                size = take_rows(tensors[piece.name], piece.rows, piece.dim).numel()
                units.append(_Unit([piece], size, size / self.beta if vector else float("inf")))
        return units

    def _threshold(self, units: list[_Unit], budget: int) -> int:
        """The lowest score, as the bits of an fp32 number, at which no more than the budget is spent."""
        found = 0
        for bit in range(BITS - 1, -1, -1):
            candidate = found | ((1 << bit) - 1)  # everything above this many would be selected
            if sum(unit.spent(candidate, self.entries) for unit in units) > budget:
                found |= 1 << bit
        return found

    def _content(self, model: nn.Module, units: list[_Unit], threshold: int, scores: Tensors) -> Json:
        groups: list[Json] = [{"method": to_spec(method), "sites": []} for method in self.modules]
        whole: list[str] = []
        single: Tensors = {}
        for unit in units:
            if unit.whole(threshold):
                if unit.module is None:
                    whole.append(unit.pieces[0].name)
                else:
                    number, site = unit.module
                    groups[number]["sites"].append([site.path, site.role])
            elif self.entries and unit.count(threshold):
                for piece, mask in zip(unit.pieces, unit.masks(threshold)):
                    before = single.setdefault(piece.name, torch.zeros_like(scores[piece.name], dtype=torch.bool))
                    single[piece.name] = put_rows(before, mask, piece.rows, piece.dim)
        return plan_content(
            original_class(model).__name__,
            structured=[group for group in groups if group["sites"]],
            whole=whole,
            sparse={name: mask.flatten().nonzero().flatten() for name, mask in single.items()},
            shapes={name: tuple(value.shape) for name, value in scores.items()},
            trainable=sum(unit.spent(threshold, self.entries) for unit in units),
            units=[account for unit in units for account in unit.accounts(threshold, self.entries)],
            sensitivity={name: float(value.sum()) for name, value in scores.items()},
        )


def allocate(
    model: nn.Module,
    data: Iterable[Batch],
    budget: float | str = "0.2M",
    structured: Sequence[Method] | Method | None = None,
    loss: Loss = default_loss,
    **options: Argument,
) -> Plan:
    """Spend a budget of trainable parameters where the loss is most sensitive; the plan is a method and a JSON file.

    `plan = allocate(model, loader, budget="0.2M", structured=LoRA(rank=8, at="attn.*"))`, then `plan.save("plan.json")`
    and `attach(model, plan)`. `options` are those of `SPT`. The model is left as it was.
    """
    chosen: Kwargs = {} if structured is None else {"structured": structured}
    method = SPT(budget=budget, **chosen, **options)
    return method.resolve(model, data, loss)


def parse_budget(budget: float | str, total: int) -> int:
    """`200_000`, `"0.2M"`, `"50k"`, or a share `"0.5%"` of `total` as a number of parameters.

    Raises:
        ConfigError: not a positive number.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kKmM%]?)\s*", str(budget).replace("_", ""))
    try:
        number = float(match[1]) if match else float("nan")
    except ValueError:
        number = float("nan")
    unit = {"k": 1e3, "m": 1e6, "%": total / 100, "": 1.0}[match[2].lower() if match else ""]
    if not number * unit >= 1:
        raise ConfigError(f"SPT: expected a budget such as 200_000, '0.2M' or a share '0.5%', got {budget!r}")
    return int(number * unit)


@dataclass(frozen=True)
class _Only:
    """A predicate: this site."""

    site: Site

    def __call__(self, site: Site) -> bool:
        return (site.path, site.role, site.tower) == (self.site.path, self.site.role, self.site.tower)


@dataclass(frozen=True)
class _Piece:
    """A tensor, or the rows of it that one site owns."""

    name: str
    rows: Rows | None
    dim: int
    path: str
    role: str
    depth: int
    tower: str

    def inside(self, site: Site) -> bool:
        """Whether a module at `site` stands for this piece: the same projection, or one inside the sub-layer."""
        if site.kind in ("linear", "conv", "embedding"):
            return (self.path, self.role) == (site.path, site.role)
        return bool(self.role) and self.path.startswith(f"{site.path}.")


def _pieces(available: list[Site], tensors: dict[str, Tensor]) -> list[_Piece]:
    params = {site.path: site for site in available if site.role == "param"}
    towers = len({site.tower for site in available}) > 1
    owners: dict[str, list[Site]] = {}
    for site in available:
        if site.kind in ("linear", "conv", "embedding"):
            owners.setdefault(f"{site.path}.{site.tensor}", []).append(site)
    found = []
    for name in tensors:
        for site in owners.get(name, [Site("", "")]):
            own = params[name]
            tower = own.tower if towers else ""
            found.append(_Piece(name, site.rows, int(site.transposed), site.path, site.role, own.depth, tower))
    return found


class _Unit:
    """Entries that are decided together: a module's, a vector's, or those of a matrix that stay single."""

    def __init__(self, pieces: list[_Piece], cost: int, enough: float, module: tuple[int, Site] | None = None) -> None:
        self.pieces, self.cost, self.enough, self.module = pieces, cost, enough, module
        self.words: list[Tensor] = []

    def read(self, scores: dict[str, Tensor]) -> None:
        """Keep the pieces' scores as integers of the same order."""
        own = [take_rows(scores[piece.name], piece.rows, piece.dim) for piece in self.pieces]
        self.words = [value.float().contiguous().view(torch.int32) for value in own]

    def masks(self, threshold: int) -> list[Tensor]:
        return [word > threshold for word in self.words]

    def accounts(self, threshold: int, entries: bool) -> list[Json]:
        """What became of each piece, for people."""
        fate = "module" if self.module else "whole"
        fate = fate if self.whole(threshold) else "entries" if entries else ""
        return [
            {
                "label": piece.role or label_of(piece.name),
                "depth": piece.depth,
                "tower": piece.tower,
                "vector": word.dim() == 1,
                "size": word.numel(),
                "selected": int(mask.sum()),
                "as": fate if mask.any() or fate != "entries" else "",
            }
            for piece, word, mask in zip(self.pieces, self.words, self.masks(threshold))
        ]

    def count(self, threshold: int) -> int:
        return sum(int(mask.sum()) for mask in self.masks(threshold))

    def whole(self, threshold: int) -> bool:
        count = self.count(threshold)
        return count > 0 and count >= self.enough

    def spent(self, threshold: int, entries: bool) -> int:
        count = self.count(threshold)
        if count and count >= self.enough:
            return self.cost
        return count if entries else 0
