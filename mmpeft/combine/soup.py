"""AdapterSoup: one adapter as the average of several, and which ones to average (arXiv:2302.07027)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError, DataError, SiteError
from mmpeft.formats.native import borrow
from mmpeft.hosting.modules import module_at
from mmpeft.hosting.output import first_of
from mmpeft.methods.former import place
from mmpeft.methods.saved import Adapter
from mmpeft.parts.base import Placement
from mmpeft.sites import sites
from mmpeft.surgery.attaching import attach
from mmpeft.surgery.choice import use
from mmpeft.surgery.liveness import call
from mmpeft.surgery.state import state_of
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.tuning import Tuning
from mmpeft.types import Batch, Output

ALIKE = 0.1
"""Adapters from one initialisation point in much the same direction; from two, nearly at right angles."""


def soup(
    model: nn.Module,
    adapters: Sequence[str | Path | Tuning],
    weights: Sequence[float] | None = None,
    name: str = "soup",
) -> Tuning:
    """A new tuning whose tensors are `Σ w_i θ_i / Σ w_i`, equal weights by default; nothing is trained.

    `adapters` are saved folders or tunings, of one method on the same sites of this base. Where the answer is linear in
    the tensors (biases, scalings, sparse changes) the update is exactly the average; elsewhere averages are good for
    adapters that started from the same values, and a warning says when these did not.

    Raises:
        ConfigError: fewer than two adapters, other methods or sites, weights that do not fit.
        AdapterFileError: a folder that cannot be read, or made for another base.
    """
    if len(adapters) < 2:
        raise ConfigError(f"soup averages at least two adapters, got {len(adapters)}")
    shares = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(shares) != len(adapters) or any(w < 0 for w in shares) or not sum(shares) > 0:
        raise ConfigError(f"soup: expected {len(adapters)} weights, none negative and not all 0, got {weights!r}")
    found = [borrow(model, adapter) for adapter in adapters]
    first = found[0]
    for other in found[1:]:
        if other.method != first.method or _shapes(other) != _shapes(first):
            raise ConfigError(
                f"soup averages adapters of one method on the same sites: {first.where} is {first.method}, "
                f"{other.where} is {other.method}"
            )
    alike = _agreement(model, found)
    if alike < ALIKE:
        warnings.warn(
            f"two of these adapters have a cosine of {alike:.2f}: they did not start from the same values, and their "
            "average is then usually worse than each; train them from one seed, or one saved start",
            stacklevel=2,
        )
    with unchanged_on_error(model):
        attach(model, first.method, name)
        tuning = Tuning(model, name)
        tuning.load_state_dict(average([adapter.tensors for adapter in found], shares))
    return tuning


def average(tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """`Σ w_i θ_i / Σ w_i` in at least fp32, name by name."""
    joined = {}
    for name, like in tensors[0].items():
        mean = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        for weight, own in zip(weights, tensors, strict=True):
            mean += weight / sum(weights) * own[name].to(mean)
        joined[name] = mean.to(like.dtype)
    return joined


def closest(
    model: nn.Module, target: Iterable[Batch], sources: Mapping[str, Iterable[Batch]], top: int = 5
) -> list[str]:
    """The `top` sources whose data look most like the target's to the plain backbone, the closest first.

    Compares by cosine the mean output of the last block over a few batches of each. Too many sources disturb each
    other: the paper averages about five.
    """
    goal = mean_features(model, target)
    alike = {
        name: float(F.cosine_similarity(goal, mean_features(model, data), dim=0)) for name, data in sources.items()
    }
    return sorted(alike, key=lambda name: -alike[name])[:top]


@torch.no_grad()
def mean_features(model: nn.Module, data: Iterable[Batch], batches: int = 4) -> Tensor:
    """Mean output [d] of the last block of the plain backbone over samples and positions; pairs are `(inputs, …)`."""
    blocks = [site for site in sites(model) if site.role == "block"]
    if not blocks:
        raise SiteError(f"the anatomy of {type(model).__name__} names no blocks to compare data by")
    last = max(blocks, key=lambda site: site.depth)
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Batch, output: Output) -> None:
        seen.append(first_of(output).movedim(last.channel_dim, -1).flatten(0, -2).float().mean(0))

    training = model.training
    handle = module_at(model, last.path).register_forward_hook(keep)
    model.eval()
    try:
        with use(model, None) if state_of(model) else nullcontext():
            for batch in islice(data, batches):
                call(model, batch[0] if isinstance(batch, list | tuple) else batch)
    finally:
        handle.remove()
        model.train(training)
    if not seen:
        raise DataError("no batch to compute features from")
    return torch.stack(seen).mean(0)


def _shapes(adapter: Adapter) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in adapter.tensors.items()}


def _values(placements: Sequence[Placement]) -> dict[str, Tensor]:
    """Tensors of parts by the names they have in a tuning."""
    return {f"{p.prefix}.{name}": tensor.detach() for p in placements for name, tensor in p.part.named_parameters()}


def _agreement(model: nn.Module, found: Sequence[Adapter]) -> float:
    """The lowest cosine between any two adapters, over the tensors that start at random; 1 where none does."""
    starts = []
    with torch.random.fork_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            starts.append(_values(place(found[0].method, model, sites(model)).placements))
    names = [name for name in found[0].tensors if name in starts[0] and not torch.equal(*(s[name] for s in starts))]
    if not names:
        return 1.0
    vectors = F.normalize(torch.stack([torch.cat([a.tensors[n].flatten().float() for n in names]) for a in found]))
    return float((vectors @ vectors.t()).min())
