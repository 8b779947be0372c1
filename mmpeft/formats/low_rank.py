"""Low-rank updates between a tuning and a file: fused projections stacked on the way out, cut on the way in."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, MMPEFTWarning, Refused, nearest
from mmpeft.formats import peft_experts
from mmpeft.formats.content import Layer
from mmpeft.formats.lycoris import multiplied
from mmpeft.formats.lycoris_out import layer_from
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import CHILD, module_at
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Union
from mmpeft.methods.recipe import own_weight
from mmpeft.methods.reparameterized.dora import DoRA
from mmpeft.methods.reparameterized.lora import LoRA
from mmpeft.parts import Delta, ExpertsDelta, LowRank
from mmpeft.parts.base import Placement
from mmpeft.sites import Site, sites
from mmpeft.sites.site import DISCARDED
from mmpeft.surgery.attached import Attached
from mmpeft.types import Json


def layers_of(tuning: Attached) -> list[Layer]:
    """The low-rank updates of a tuning, one for each module, scale baked in.

    Row slices of a fused projection become one update of the whole module: `down` stacks the `A_i`, `up` places
    each `s B_i` on its own rows and columns; slices with the same `A` share its columns.

    Raises:
        Refused: another factor than the low-rank one, or a grouped convolution.
    """
    grouped: dict[str, list[Placement]] = {}
    for placement in tuning.placements:
        if isinstance(placement.part, Delta):
            grouped.setdefault(placement.home, []).append(placement)
    return [_stack(tuning.model, path, found) for path, found in grouped.items()]


@torch.no_grad()
def _stack(model: nn.Module, path: str, placements: list[Placement]) -> Layer:
    module = module_at(model, path)
    if getattr(module, "groups", 1) > 1:
        raise Refused(f"{path} is a grouped convolution; other tools have no update of one. Use tuning.save()")
    weight: Tensor = base_value(module, placements[0].hooks[0].name or "weight")
    parts = [placement.part for placement in placements if isinstance(placement.part, Delta)]
    transposed = parts[0].transposed
    weight = weight.T if transposed else weight
    if len(parts) == 1 and parts[0].rows is None and not transposed:
        own = layer_from(parts[0].factor, path, weight, parts[0].scale)
        if own is not None:
            return own
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    owners = weight.new_zeros(len(weight))
    kinds: set[str] = set()
    for part in parts:
        down, up, kind = _halves(part, path, weight)
        kinds |= {kind} if kind else set()
        same = next((i for i, known in enumerate(downs) if torch.equal(known, down)), None)
        if same is None:
            same = len(downs)
            downs.append(down)
            ups.append(up.new_zeros(len(weight), len(down)))
        ups[same] += put_rows(torch.zeros_like(ups[same]), up, part.rows)
        owners += put_rows(torch.zeros_like(owners), owners.new_ones(len(up)), part.rows)
    down, up = torch.cat(downs), torch.cat(ups, 1)
    magnitude = None
    if any(part.magnitude is not None for part in parts):
        if (owners > 1).any():
            raise Refused(f"{path} has DoRA and another update on the same rows; no file holds one inside the other")
        magnitude = _row_norms(weight, up @ down)  # rows without DoRA keep the length they have
        for part in parts:
            if part.magnitude is not None:
                magnitude = put_rows(magnitude, part.magnitude.detach(), part.rows)
    down = down.view(len(down), *weight.shape[1:])
    if kinds and len(down) > min(len(up), down[0].numel()):  # other factors may have more columns than the weight
        down, up = multiplied((up @ down.flatten(1)).view(-1, *down.shape[1:]))
    kind = "+".join(sorted(kinds))
    rank, lookup = float(len(down)), parts[0].lookup
    return Layer(path, down, up, rank, magnitude, transposed=transposed, lookup=lookup, factor=kind)


def _halves(part: Delta, path: str, weight: Tensor) -> tuple[Tensor, Tensor, str]:
    """`down` and `up` of one part, scale baked in; of another factor those of the low-rank update that it equals."""
    if isinstance(part.factor, LowRank):
        down, up = (tensor.detach() for tensor in part.pair())
        return down, up * part.scale, ""
    own = layer_from(part.factor, path, take_rows(weight, part.rows), part.scale)
    if own is not None:
        return own.down.flatten(1), own.up * own.scale, own.factor
    down, up = multiplied(part.factor.materialise().detach() * part.scale)
    return down, up, type(part.factor).__name__


def _row_norms(weight: Tensor, delta: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight.to(delta.dtype).flatten(1) + delta, dim=1)
    return norms


def delta_weights(layers: Sequence[Layer], base: nn.Module | None = None) -> dict[str, Tensor]:
    """ΔW of each module, [o, i, ...]; of DoRA layers `m (W + sBA)/‖W + sBA‖ − W`, which needs the base."""
    found = {}
    for layer in layers:
        delta = (layer.up.float() @ layer.down.float().flatten(1)) * layer.scale
        if layer.magnitude is not None:
            if base is None:
                raise ValueError(f"ΔW of the DoRA layer {layer.path} needs the base model")
            weight: Tensor = base_value(module_at(base, layer.path), "weight").float()
            weight = (weight.T if layer.transposed else weight).flatten(1)
            gain = layer.magnitude.float() / _row_norms(weight, delta)
            delta = gain[:, None] * (weight + delta) - weight
        found[layer.path] = delta.view(-1, *layer.down.shape[1:])
    return found


# -- into a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The part of a layer that one site takes."""

    site: Site
    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        return self.down.shape[-2]


def fit_layers(model: nn.Module, layers: Sequence[Layer], where: object) -> list[Piece]:
    """Cut layers to the sites of a model; the model is not changed.

    Raises:
        AdapterFileError: a layer without a site, of another shape, or named twice.
    """
    by_path = tunable_sites(model, ("linear", "conv", "embedding"))
    layers = _acting(model, layers, by_path, where)
    check_paths(model, [layer.path for layer in layers], by_path, where)
    signed = [layer if layer.scale >= 0 else layer.baked() for layer in layers]
    return [piece for layer in signed for piece in _cut(model, layer, by_path[layer.path], where)]


def _acting(
    model: nn.Module, layers: Sequence[Layer], known: Mapping[str, list[Site]], where: object
) -> Sequence[Layer]:
    """Layers without those that change nothing where they could not be tuned: of zeros, or on a discarded output."""
    modules = {path for path, _ in model.named_modules()}
    idle: dict[str, str] = {}
    for layer in layers:
        own = known.get(layer.path, [])
        if own and all(site.refuse.startswith(DISCARDED) for site in own):
            idle[layer.path] = own[0].refuse
        elif layer.path in modules and all(site.refuse for site in own) and not _moves(layer):
            idle[layer.path] = "it is zero"
    if idle:
        first = min(idle)
        warnings.warn(
            f"{where}: {len(idle)} of {len(layers)} updates have no effect and are left out, first that of {first} "
            f"({idle[first]})",
            MMPEFTWarning,
            stacklevel=2,
        )
    return [layer for layer in layers if layer.path not in idle]


def _moves(layer: Layer) -> bool:
    return layer.magnitude is not None or bool(layer.up.any() and layer.down.any())


def fit_stacks(model: nn.Module, found: peft_experts.StackTensors, where: object) -> list[Piece]:
    """Cut updates of parameters to the sites of a model: of experts, and of single matrices.

    Raises:
        AdapterFileError: a parameter without a site, or of another shape.
    """
    known: dict[tuple[str, str], list[Site]] = {}
    for site in sites(model):
        if site.kind == "experts" and not site.refuse:
            known.setdefault((site.path, site.tensor), []).append(site)
    pieces = []
    single: list[Layer] = []
    for layer in peft_experts.fit(model, found, where):
        if layer.tensor == "weight" and base_value(module_at(model, layer.path), layer.tensor).dim() == 2:
            single.append(_single(model, layer))
            continue
        own = known.get((layer.path, layer.tensor), [])
        if not own:
            raise AdapterFileError(f"{where}: {layer.name} is no stack of experts in {type(model).__name__}")
        turned = own[0].transposed
        down, up = (layer.up.mT, layer.down.mT) if turned else (layer.down, layer.up)
        for site in own:
            rows = take_rows(up, site.rows, -2)
            keep = (rows != 0).flatten(0, 1).any(0) | (up == 0).flatten(0, 1).all(0)
            if keep.any():
                rank = int(keep.sum())
                pieces.append(Piece(site, down[:, keep], rows[:, :, keep], layer.scale * rank, None))
    return pieces + fit_layers(model, single, where)


def _single(model: nn.Module, layer: peft_experts.StackLayer) -> Layer:
    """The update of one matrix, which is as it is stored, as that of the module that has it as its weight."""
    down, up = layer.down[0], layer.up[0]
    if any(site.transposed for site in tunable_sites(model, ("linear",)).get(layer.path, [])):
        down, up = up.mT, down.mT
    return Layer(layer.path, down, up, layer.scale * len(down))


def tunable_sites(model: nn.Module, kinds: tuple[str, ...]) -> dict[str, list[Site]]:
    """Sites of the kinds given by module; of a module with a site for all its rows only that one."""
    found: dict[str, list[Site]] = {}
    for site in sites(model):
        if site.kind in kinds and site.tensor == "weight":
            found.setdefault(site.path, []).append(site)
    return {path: [s for s in own if s.rows is None][:1] or own for path, own in found.items()}


def check_paths(model: nn.Module, paths: Sequence[str], known: Mapping[str, list[Site]], where: object) -> None:
    """Raise AdapterFileError unless every path is a tunable module of the model, each named once."""
    name = type(model).__name__.removeprefix("Tuned")
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise AdapterFileError(f"{where}: {twice[0]} appears twice")
    unmatched = [path for path in paths if path not in known]
    if not unmatched:
        return
    modules = {path for path, _ in model.named_modules() if CHILD not in path.split(".")}
    first = unmatched[0]
    why = (
        f"{first!r} is a module of {name} that its anatomy does not offer for tuning"
        if first in modules
        else f"{name} has no module {first!r}.{nearest(first, known)}"
    )
    none = "none of the layers matches" if len(unmatched) == len(paths) else "some layers do not match"
    raise AdapterFileError(
        f"{where}: {none}: {len(unmatched)} of {len(paths)} layers have no place in this model ({why}). Load the base "
        "that the adapter was made for"
    )


def _cut(model: nn.Module, layer: Layer, own: list[Site], where: object) -> list[Piece]:
    weight = own_weight(model, own[0])
    down = layer.down
    trimmed = [list(shape) for shape in (down.shape[1:], weight.shape[1:])]
    for shape in trimmed:  # a 1 × 1 convolution and a linear are one thing
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
    if trimmed[0] != trimmed[1] or len(layer.up) != len(weight):
        got = (len(layer.up), *down.shape[1:])
        raise AdapterFileError(
            f"{where}: {layer.path} is an update of a weight {list(got)}, the model's has {list(weight.shape)}; the "
            "adapter was made for another base"
        )
    alpha = float(layer.rank) if layer.alpha is None else layer.alpha
    flat = down.flatten(1)
    if own[0].rows is None:
        return [Piece(own[0], flat, layer.up, alpha, layer.magnitude)]
    # A column that acts on other rows alone belongs to their slice; a fresh adapter's columns act on none yet.
    unborn = (layer.up == 0).all(0)
    still = layer.magnitude if layer.magnitude is None else _row_norms(weight, torch.zeros((), dtype=torch.float32))
    shared = len({site.role for site in own}) < len(own)  # a selector could not tell such slices apart
    pieces, covered = [], torch.zeros(len(weight), dtype=torch.bool)
    for site in own:
        covered = put_rows(covered, take_rows(torch.ones_like(covered), site.rows), site.rows)
        up = take_rows(layer.up, site.rows)
        keep = (up != 0).any(0) | unborn | shared
        lengths = None if layer.magnitude is None else take_rows(layer.magnitude, site.rows)
        resting = lengths is None or still is None or _close(lengths, take_rows(still, site.rows))
        if not keep.any():
            if resting:
                continue
            keep[0] = True
        rank = int(keep.sum())
        pieces.append(Piece(site, flat[keep], up[:, keep], alpha * rank / layer.rank, lengths))
    lost = (layer.up != 0).any(1)
    if still is not None and layer.magnitude is not None:
        lost |= ~torch.isclose(layer.magnitude.float().cpu(), still.cpu(), rtol=1e-6, atol=0)
    if (lost & ~covered).any():
        raise AdapterFileError(
            f"{where}: {layer.path} changes output rows that no site of {type(model).__name__} owns; sites own "
            f"{[site.rows for site in own]} of {len(weight)}"
        )
    return pieces


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float().cpu(), b.float().cpu(), rtol=1e-6, atol=0)


def method_for(model: nn.Module, pieces: Sequence[Piece], dropout: float = 0.0) -> Method:
    """The LoRA or DoRA (or both) whose sites, ranks and scales are those of the pieces."""
    available = [site for site in sites(model) if site.kind != "param"]
    methods: list[Method] = []
    for cls, own in (
        (LoRA, [piece for piece in pieces if piece.magnitude is None]),
        (DoRA, [piece for piece in pieces if piece.magnitude is not None]),
    ):
        if own:
            (rank, alpha), _ = Counter((p.rank, p.alpha) for p in own).most_common(1)[0]
            ranks = _pattern([(p.site, p.rank) for p in own], rank, available)
            alphas = _pattern([(p.site, p.alpha) for p in own], alpha, available)
            at = selector([p.site for p in own], available)
            patterns: Json = {"rank_pattern": ranks, "alpha_pattern": alphas}
            methods.append(cls(at=at, rank=rank, alpha=alpha, dropout=dropout, **patterns))
    return methods[0] if len(methods) == 1 else Union(methods)


def _pattern(values: list[tuple[Site, float]], default: float, available: list[Site]) -> dict[str, float]:
    groups: dict[float, list[Site]] = {}
    for site, value in values:
        if value != default:
            groups.setdefault(value, []).append(site)
    return {selector(group, available): value for value, group in groups.items()}


def selector(chosen: Sequence[Site], available: Sequence[Site]) -> str:
    """An `at=` that names exactly the chosen sites: by role where a role is chosen whole, else by path."""
    total, own = Counter(s.role for s in available), Counter(s.role for s in chosen)
    whole = [role for role in own if own[role] == total[role]]
    return "|".join([*whole, *(f"{s.role} & path={s.path}" for s in chosen if s.role not in whole)])


@torch.no_grad()
def set_pieces(placements: Sequence[Placement], pieces: Sequence[Piece]) -> None:
    """Put the tensors of pieces into the parts that `method_for` placed."""
    stacks = {(p.site.path, p.site.tensor, p.site.rows): p for p in pieces if p.site.kind == "experts"}
    wanted = {(piece.site.path, piece.site.rows): piece for piece in pieces if piece.site.kind != "experts"}
    for placement in placements:
        part = placement.part
        if isinstance(part, ExpertsDelta):
            stack = stacks.pop((placement.home, placement.hooks[0].name, part.rows))
            part.A.copy_(stack.down)
            part.B.copy_(stack.up)
        elif isinstance(part, Delta):
            piece = wanted.pop((placement.home, part.rows))
            for own, value in zip(part.pair(), (piece.down, piece.up)):
                own.copy_(value)
            if part.magnitude is not None and piece.magnitude is not None:
                part.magnitude.copy_(piece.magnitude)
    assert not wanted
    assert not stacks
