"""Between a tuning on a model and the neutral content of a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, Refused, SiteError, UnusedTensorsWarning
from mmpeft.formats import hub_out, peft_experts, peft_prompts
from mmpeft.formats.content import Content, Layer, Scaling
from mmpeft.formats.forms import FOLDERS
from mmpeft.formats.hub import Bottleneck, Bottlenecks
from mmpeft.formats.low_rank import (
    check_paths,
    fit_layers,
    fit_stacks,
    layers_of,
    method_for,
    selector,
    set_pieces,
    tunable_sites,
)
from mmpeft.formats.peft import targeted
from mmpeft.formats.tensors import differences, fit_tensors, held
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at, own_parameters
from mmpeft.methods.additive.ia3 import IA3
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Union
from mmpeft.methods.recipe import own_weight
from mmpeft.parts import Branch, Delta, ExpertsDelta, Mask, Rescale
from mmpeft.parts.base import Placement
from mmpeft.sites import Site, sites
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.attaching import attach
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.types import Kwargs

Side = Literal["input", "output"]


def content_of(tuning: Attached, format: str) -> Content:
    """Everything that a tuning trains, as a file of the format can hold it.

    Raises:
        Refused: a part that exists in no such file, or a weight that the format's readers cannot reach.
        ConfigError: the tuning is merged.
    """
    if tuning._state.merged:
        raise ConfigError(f"unmerge() {list(tuning._state.merged)} before exporting: the base holds merged weights")
    if format == "adapterhub" and any(isinstance(p.part, Branch) for p in tuning.placements):
        return hub_out.bottlenecks_of(tuning)
    masks = [p for p in tuning.placements if isinstance(p.part, Mask)]
    scales = [p for p in tuning.placements if isinstance(p.part, Rescale)]
    learned = [p for p in tuning.placements if peft_prompts.is_learned(p)] if format == "peft" else []
    if learned and len(learned) + len(masks) < len(tuning.placements):
        raise Refused(f"{tuning.method} has a prompt or prefix beside other parts; a PEFT folder holds one of them")
    if learned:
        own = held(tuning.model, masks, ())
        if own.base or own.shifts or own.words:
            raise Refused(f"{tuning.method} trains parts of modules beside a prompt; PEFT saves whole ones only there")
        return Content(format, whole=own.whole, learned=peft_prompts.learned_of(tuning.model, learned, own.whole))
    layers = layers_of(tuning)
    stacks = peft_experts.tensors_of(tuning.model, tuning.placements) if format == "peft" else None
    for placement in tuning.placements:
        _check_part(placement, format)
    if not layers and not scales and stacks is None and not (masks and format != "diffusers"):
        raise Refused(
            f"{tuning.method} has no low-rank update or (IA)³ vector, and {format} files hold nothing else alone"
        )
    if (layers or stacks) and scales:
        raise Refused(f"{tuning.method} has both low-rank updates and (IA)³ vectors; a {format} file holds one of them")
    vectors = _scalings(tuning.model, scales)
    told: Kwargs = {}
    if masks and format not in FOLDERS:
        full, told["shifts"] = differences(tuning.model, masks)
        layers += full
    elif masks:
        own = held(tuning.model, masks, {layer.path for layer in layers} | {vector.path for vector in vectors})
        lone = sorted({shift.path for shift in own.shifts} - {layer.path for layer in layers if not layer.lookup})
        if lone and format == "peft":
            raise Refused(
                f"{lone[0]} has got a bias, for which PEFT has a place in a low-rank update only; create=False"
            )
        told = {"whole": own.whole, "base": own.base, "shifts": own.shifts, "words": own.words}
    rates = {p.part.dropout for p in tuning.placements if isinstance(p.part, Delta) and not p.part.lookup}
    dropout = rates.pop() if len(rates) == 1 else 0.0
    if stacks is not None:
        widest = max([*(layer.rank for layer in layers), *stacks.config["ranks"].values()])
        stacks = peft_experts.padded(stacks, widest)
    return Content(format, layers, vectors, dropout=dropout, stacks=stacks, **told)


def _check_part(placement: Placement, format: str) -> None:
    part, where = placement.part, placement.home or "the model"
    if isinstance(part, ExpertsDelta) and format == "peft":
        return
    if not isinstance(part, Delta | Mask | Rescale) or (isinstance(part, Rescale) and part.beta is not None):
        raise Refused(f"{type(part).__name__} at {where} exists in no exchange format; use tuning.save()")
    vectors = isinstance(part, Rescale) and format not in ("peft", "adapterhub")
    if vectors or (isinstance(part, Mask) and format == "diffusers"):
        what = "(IA)³ vectors" if isinstance(part, Rescale) else "whole tensors"
        raise Refused(f"{format} files hold low-rank layers only; this tuning has {what} at {where}")
    read = [hook for hook in placement.hooks if hook.kind == "read"]
    if isinstance(part, Delta | Rescale) and read and (format != "kohya" or read[0].name != "weight"):
        raise Refused(
            f"the backbone reads {where}.{read[0].name} directly; readers of {format} files wrap the module's call, "
            "which never happens there, and the adapter would have no effect. Use tuning.save(), or merge()"
        )


def _scalings(model: nn.Module, placements: Sequence[Placement]) -> list[Scaling]:
    found: dict[str, Scaling] = {}
    for placement in placements:
        part, path = placement.part, placement.home
        assert isinstance(part, Rescale)
        weight = base_value(module_at(model, path), "weight")
        if weight.dim() != 2:
            raise Refused(f"a vector on {path}, which is no linear, exists in no exchange format; use tuning.save()")
        if path in found and found[path].side != part.side:
            raise Refused(f"{path} has a vector on its input and one on its output; a file holds one")
        gamma = part.gamma.detach()
        if part.side == "output":
            size = weight.shape[1] if part.transposed else weight.shape[0]
            rows = found[path].gamma if path in found else gamma.new_ones(size)
            gamma = put_rows(rows, take_rows(rows, part.rows) * gamma, part.rows)
        found[path] = Scaling(path, gamma, part.side, part.transposed)
    return list(found.values())


# -- into a model -------------------------------------------------------------------------------------------


def attach_layers(model: nn.Module, layers: Sequence[Layer], name: str = "default") -> Attached:
    """Attach low-rank updates by module path as a LoRA or DoRA (or both) on exactly those modules.

    Raises:
        AdapterFileError: a layer has no place in the model. The model is left as it was.
    """
    return attach_content(model, Content("layers", list(layers)), name, "layers")


@torch.no_grad()
def attach_content(model: nn.Module, content: Content, name: str, where: object, *, strict: bool = False) -> Attached:
    """Attach a method that places exactly the content's tensors, and set them; all checks come first.

    Tensors that are no part of the adapter and have no place in the model are left with a warning, or refused if
    `strict`.

    Raises:
        AdapterFileError: a tensor has no place in the model. The model is left as it was.
    """
    content.check(where)
    with unchanged_on_error(model):
        pieces = fit_layers(model, content.layers, where)
        pieces += fit_stacks(model, content.stacks, where) if content.stacks else []
        vectors = _fit_scalings(model, content.scalings, where)
        tensors = fit_tensors(model, content, where)
        if tensors.unused and strict:
            raise AdapterFileError(f"{where}: {_unused(model, tensors.unused)}; strict=False loads the rest")
        _check_complete(model, content, where)
        methods: list[Method] = [method_for(model, pieces, content.dropout)] if pieces else []
        tokens: dict[str, Tensor] = {}
        if content.learned is not None:
            method, tokens = peft_prompts.method_for(model, content.learned, where)
            methods.append(method)
        available = [site for site in sites(model) if site.kind != "param"]
        methods += _vectors(vectors, available)
        bottlenecks: dict[str, Bottleneck] = {}
        if isinstance(content, Bottlenecks):
            own, bottlenecks = hub_out.methods_for(model, content, where)
            methods += own
        methods += tensors.methods
        if not methods:
            raise AdapterFileError(f"{where} holds no layer")
        try:
            attach(model, methods[0] if len(methods) == 1 else Union(methods), name)
        except (SiteError, Refused) as error:
            raise AdapterFileError(f"{where} does not attach to {type(model).__name__}: {error}") from error
        tuning = Attached(model, name)
        set_pieces(tuning.placements, pieces)
        peft_prompts.fill(tuning.placements, tokens)
        hub_out.fill(tuning.placements, bottlenecks)
        by_rows = {(site.path, site.rows): gamma for site, (gamma, _) in vectors}
        for placement in tuning.placements:
            part, path = placement.part, placement.home
            if isinstance(part, Rescale):
                part.gamma.copy_(by_rows[path, part.rows] if part.side == "output" else by_rows[path, None])
            elif isinstance(part, Mask):
                tensors.fill(placement)
        if tensors.unused:
            warnings.warn(f"{where}: {_unused(model, tensors.unused)}", UnusedTensorsWarning, stacklevel=4)
        return tuning


def _unused(model: nn.Module, names: Sequence[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} tensors are no part of the adapter and none of {type(model).__name__}, and are left: {listed}"


def _check_complete(model: nn.Module, content: Content, where: object) -> None:
    """Raise AdapterFileError if a module that the file says it is for has no tensors in it."""
    have = (
        {layer.path for layer in content.layers} | {scaling.path for scaling in content.scalings} | set(content.whole)
    )
    inside = tuple(f"{path}." for path in content.whole)
    known = tunable_sites(model, ("linear", "conv", "embedding"))
    lacking = [p for p in known if targeted(content.targets, p) and p not in have and not p.startswith(inside)]
    named = [(path, module) for path, module in model.named_modules() if targeted(content.modules, path)]
    lacking += [path for path, module in named if path not in have and any(own_parameters(module))]
    if lacking:
        raise AdapterFileError(
            f"{where}: {len(lacking)} modules that its config names have no tensors in it, first {lacking[0]!r}; the "
            "file is a part, or its base was another"
        )


def _vectors(vectors: Sequence[tuple[Site, tuple[Tensor, Side]]], available: Sequence[Site]) -> list[Method]:
    """One IA3 where the sides are the usual ones, else one for each side."""
    usual = IA3()
    if not vectors:
        return []
    if all(usual.scales_input(site) == (side == "input") for site, (_, side) in vectors):
        return [IA3(at=selector([site for site, _ in vectors], available))]
    sides: tuple[Side, ...] = ("input", "output")
    chosen = {side: [site for site, (_, own) in vectors if own == side] for side in sides}
    return [IA3(at=selector(own, available), side=side) for side, own in chosen.items() if own]


def _fit_scalings(
    model: nn.Module, scalings: Sequence[Scaling], where: object
) -> list[tuple[Site, tuple[Tensor, Side]]]:
    """The vector of each site, and the side it acts on."""
    if not scalings:
        return []
    known = tunable_sites(model, ("linear",))
    check_paths(model, [scaling.path for scaling in scalings], known, where)
    found: list[tuple[Site, tuple[Tensor, Side]]] = []
    for scaling in scalings:
        own, inner = known[scaling.path], scaling.side == "input"
        width = own_weight(model, own[0]).shape[1 if inner else 0]
        if len(scaling.gamma) != width:
            raise AdapterFileError(
                f"{where}: {scaling.path} has {len(scaling.gamma)} values on its {scaling.side}, the model's has "
                f"{width}; the adapter was made for another base"
            )
        if inner and len(own) > 1:
            raise AdapterFileError(
                f"{where}: the vector of {scaling.path} acts on the input of {len(own)} projections, and IA3 has one "
                "for each; the adapter cannot be loaded"
            )
        pairs = [(site, scaling.gamma if inner else take_rows(scaling.gamma, site.rows)) for site in own]
        moved = [(site, gamma) for site, gamma in pairs if (gamma != 1).any()]
        found += [(site, (gamma, scaling.side)) for site, gamma in moved or pairs]
    return found
