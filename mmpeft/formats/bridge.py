"""Between a tuning on a model and the neutral content of a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, Refused, SiteError, nearest
from mmpeft.formats import peft_experts, peft_prompts
from mmpeft.formats.content import Content, Layer, Scaling, Shift
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
from mmpeft.formats.lycoris import multiplied
from mmpeft.formats.peft import targeted
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import CHILD, module_at
from mmpeft.methods.additive.ia3 import IA3
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Union
from mmpeft.methods.recipe import own_weight
from mmpeft.methods.selective.full import Full
from mmpeft.parts import Delta, ExpertsDelta, Mask, Rescale
from mmpeft.parts.base import Placement
from mmpeft.sites import Site, sites
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.attaching import attach
from mmpeft.surgery.transaction import unchanged_on_error


def content_of(tuning: Attached, format: str) -> Content:
    """Everything that a tuning trains, as a file of the format can hold it.

    Raises:
        Refused: a part that exists in no such file, or a weight that the format's readers cannot reach.
        ConfigError: the tuning is merged.
    """
    if tuning._state.merged:
        raise ConfigError(f"unmerge() {list(tuning._state.merged)} before exporting: the base holds merged weights")
    masks = [p for p in tuning.placements if isinstance(p.part, Mask)]
    scales = [p for p in tuning.placements if isinstance(p.part, Rescale)]
    learned = [p for p in tuning.placements if peft_prompts.is_learned(p)] if format == "peft" else []
    if learned and len(learned) + len(masks) < len(tuning.placements):
        raise Refused(f"{tuning.method} has a prompt or prefix beside other parts; a PEFT folder holds one of them")
    if learned:
        kept = _whole_modules(tuning.model, masks)
        return Content(format, whole=kept, learned=peft_prompts.learned_of(tuning.model, learned, kept))
    layers = layers_of(tuning)
    stacks = peft_experts.tensors_of(tuning.model, tuning.placements) if format == "peft" else None
    for placement in tuning.placements:
        _check_part(placement, format)
    files = format in ("kohya", "comfy") and masks
    if not layers and not scales and stacks is None and not files:
        raise Refused(
            f"{tuning.method} has no low-rank update or (IA)³ vector, and {format} files hold nothing else alone"
        )
    if (layers or stacks) and scales:
        raise Refused(f"{tuning.method} has both low-rank updates and (IA)³ vectors; a {format} file holds one of them")
    whole: dict[str, dict[str, Tensor]] = {}
    shifts: list[Shift] = []
    if masks and format in ("kohya", "comfy"):
        own, shifts = _differences(tuning.model, masks)
        layers += own
    elif masks:
        whole = _whole_modules(tuning.model, masks)
    rates = {p.part.dropout for p in tuning.placements if isinstance(p.part, Delta) and not p.part.lookup}
    dropout = rates.pop() if len(rates) == 1 else 0.0
    return Content(format, layers, _scalings(tuning.model, scales), whole, dropout, stacks=stacks, shifts=shifts)


def _check_part(placement: Placement, format: str) -> None:
    part, where = placement.part, placement.home or "the model"
    if isinstance(part, ExpertsDelta) and format == "peft":
        return
    if not isinstance(part, Delta | Mask | Rescale) or (isinstance(part, Rescale) and part.beta is not None):
        raise Refused(f"{type(part).__name__} at {where} exists in no exchange format; use tuning.save()")
    if isinstance(part, Rescale | Mask) and format != "peft" and (isinstance(part, Rescale) or format == "diffusers"):
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


def _whole_modules(model: nn.Module, placements: Sequence[Placement]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for placement in placements:
        part, hook = placement.part, placement.hooks[0]
        assert isinstance(part, Mask)
        if part.rows is not None or not hook.path:
            raise Refused(
                f"{hook.path}.{hook.name} is trained in part or is no module's; PEFT saves whole modules only"
            )
        found.setdefault(hook.path, {})[hook.name] = part.value.detach()
    for path, own in found.items():
        names = set(_own_parameters(module_at(model, path)))
        if names != set(own):
            raise Refused(
                f"of {path}, {sorted(own)} are trained and {sorted(names - set(own))} are not; PEFT saves whole modules"
            )
    return found


def _differences(model: nn.Module, placements: Sequence[Placement]) -> tuple[list[Layer], list[Shift]]:
    """What trained in place of the base's tensors, as their full differences; a norm's bias has its weight beside it.

    Raises:
        Refused: a tensor that is no module's weight or bias.
    """
    values: dict[tuple[str, str], Tensor] = {}
    for placement in placements:
        part, hook = placement.part, placement.hooks[0]
        assert isinstance(part, Mask)
        if hook.name not in ("weight", "bias") or not hook.path:
            raise Refused(f"{hook.path}.{hook.name} is no weight or bias of a module; use tuning.save()")
        if module_at(model, hook.path)._parameters.get(hook.name, None) is None:
            raise Refused(
                f"{hook.path} has no {hook.name} in the base, and readers of such files change only what is there; "
                "train BitFit(create=False), or use tuning.save()"
            )
        base = base_value(module_at(model, hook.path), hook.name).detach().float()
        before = values.get((hook.path, hook.name), torch.zeros_like(base))
        own = take_rows(before, part.rows, part.dim)
        own = own + part.value.detach().float() - take_rows(base, part.rows, part.dim)
        values[hook.path, hook.name] = put_rows(before, own, part.rows, part.dim)
    layers, shifts = [], []
    for (path, name), value in values.items():
        if value.dim() > 1:
            down, up = multiplied(value)
            layers.append(Layer(path, down, up, float(len(down)), factor="full difference", tensors={"diff": value}))
            continue
        weight = base_value(module_at(model, path), "weight")
        if name == "bias" and weight.dim() == 1 and (path, "weight") not in values:
            shifts.append(Shift(path, "weight", torch.zeros_like(weight, dtype=torch.float32)))
        shifts.append(Shift(path, "weight" if name == "weight" else "bias", value))
    return layers, shifts


def _own_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters() if CHILD not in n.split(".")}


# -- into a model -------------------------------------------------------------------------------------------


def attach_layers(model: nn.Module, layers: Sequence[Layer], name: str = "default") -> Attached:
    """Attach low-rank updates by module path as a LoRA or DoRA (or both) on exactly those modules.

    Raises:
        AdapterFileError: a layer has no place in the model. The model is left as it was.
    """
    return attach_content(model, Content("layers", list(layers)), name, "layers")


@torch.no_grad()
def attach_content(model: nn.Module, content: Content, name: str, where: object) -> Attached:
    """Attach a method that places exactly the content's tensors, and set them; all checks come first.

    Raises:
        AdapterFileError: a tensor has no place in the model. The model is left as it was.
    """
    content.check(where)
    with unchanged_on_error(model):
        pieces = fit_layers(model, content.layers, where)
        pieces += fit_stacks(model, content.stacks, where) if content.stacks else []
        vectors = _fit_scalings(model, content.scalings, where)
        tensors = _fit_whole(model, content.whole, where) | _fit_shifts(model, content.shifts, where)
        _check_complete(model, content, where)
        methods: list[Method] = [method_for(model, pieces, content.dropout)] if pieces else []
        tokens: dict[str, Tensor] = {}
        if content.learned is not None:
            method, tokens = peft_prompts.method_for(model, content.learned, where)
            methods.append(method)
        available = [site for site in sites(model) if site.kind != "param"]
        if vectors:
            methods.append(IA3(at=selector([site for site, _ in vectors], available)))
        if tensors:
            methods.append(Full(at="|".join(f"param & path={path}" for path in tensors)))
        if not methods:
            raise AdapterFileError(f"{where} holds no layer")
        try:
            attach(model, methods[0] if len(methods) == 1 else Union(methods), name)
        except (SiteError, Refused) as error:
            raise AdapterFileError(f"{where} does not attach to {type(model).__name__}: {error}") from error
        tuning = Attached(model, name)
        set_pieces(tuning.placements, pieces)
        peft_prompts.fill(tuning.placements, tokens)
        by_rows = {(site.path, site.rows): gamma for site, gamma in vectors}
        for placement in tuning.placements:
            part, path = placement.part, placement.home
            if isinstance(part, Rescale):
                part.gamma.copy_(by_rows[path, part.rows] if part.side == "output" else by_rows[path, None])
            elif isinstance(part, Mask):
                part.value.copy_(tensors[f"{path}.{placement.hooks[0].name}".lstrip(".")])
        return tuning


def _check_complete(model: nn.Module, content: Content, where: object) -> None:
    """Raise AdapterFileError if a module that the file says it is for has no tensors in it."""
    have = (
        {layer.path for layer in content.layers} | {scaling.path for scaling in content.scalings} | set(content.whole)
    )
    lacking = [
        p
        for p in tunable_sites(model, ("linear", "conv", "embedding"))
        if targeted(content.targets, p) and p not in have
    ]
    named = [(path, module) for path, module in model.named_modules() if targeted(content.modules, path)]
    lacking += [path for path, module in named if path not in have and _own_parameters(module)]
    if lacking:
        raise AdapterFileError(
            f"{where}: {len(lacking)} modules that its config names have no tensors in it, first {lacking[0]!r}; the "
            "file is a part, or its base was another"
        )


def _fit_scalings(model: nn.Module, scalings: Sequence[Scaling], where: object) -> list[tuple[Site, Tensor]]:
    if not scalings:
        return []
    known = tunable_sites(model, ("linear",))
    check_paths(model, [scaling.path for scaling in scalings], known, where)
    found: list[tuple[Site, Tensor]] = []
    for scaling in scalings:
        own = known[scaling.path]
        inner = own[0].role in IA3.inner
        if inner != (scaling.side == "input"):
            raise AdapterFileError(
                f"{where}: the vector of {scaling.path} acts on its {scaling.side}; IA3 acts on the "
                f"{'input' if inner else 'output'} of {own[0].role} sites"
            )
        width = own_weight(model, own[0]).shape[1 if inner else 0]
        if len(scaling.gamma) != width:
            raise AdapterFileError(
                f"{where}: {scaling.path} has {len(scaling.gamma)} values on its {scaling.side}, the model's has "
                f"{width}; the adapter was made for another base"
            )
        pairs = [(site, take_rows(scaling.gamma, site.rows)) for site in own]
        moved = [(site, gamma) for site, gamma in pairs if (gamma != 1).any()]
        found += moved or pairs
    return found


def _fit_shifts(model: nn.Module, shifts: Sequence[Shift], where: object) -> dict[str, Tensor]:
    """The new values of biases and norms' weights, by path."""
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for shift in shifts:
        names = _own_parameters(modules[shift.path]) if shift.path in modules else {}
        if shift.tensor not in names:
            name = type(model).__name__.removeprefix("Tuned")
            raise AdapterFileError(
                f"{where}: {name} has no {shift.path}.{shift.tensor}, of which the file holds a difference. Load the "
                f"base that the adapter was made for.{nearest(shift.path, modules)}"
            )
        base = base_value(modules[shift.path], shift.tensor)
        if base.shape != shift.value.shape:
            raise AdapterFileError(
                f"{where}: the difference of {shift.path}.{shift.tensor} has shape {tuple(shift.value.shape)}, the "
                f"model's has {tuple(base.shape)}; the adapter was made for another base"
            )
        path = f"{shift.path}.{shift.tensor}"
        before = found[path] if path in found else base.detach().float()
        found[path] = before + shift.value.to(before)
    return found


def _fit_whole(model: nn.Module, whole: dict[str, dict[str, Tensor]], where: object) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for path, own in whole.items():
        if path not in modules:
            raise AdapterFileError(
                f"{where}: {type(model).__name__} has no module {path!r}, which the file saves whole"
            )
        names = _own_parameters(modules[path])
        for what, keys in (
            ("not a parameter of it", set(own) - set(names)),
            ("not in the file", set(names) - set(own)),
        ):
            if keys:
                raise AdapterFileError(f"{where}: the module {path!r} is saved whole, but {min(keys)!r} is {what}")
        for name, tensor in own.items():
            if tensor.shape != names[name].shape:
                raise AdapterFileError(
                    f"{where}: {path}.{name} has shape {tuple(tensor.shape)}, the model's has "
                    f"{tuple(names[name].shape)}; build the model with as many outputs"
                )
            found[f"{path}.{name}"] = tensor
    return found
