"""Tensors of the base that an adapter has values of its own for: out of a tuning, and into a model."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, Refused, nearest
from mmpeft.formats.content import Content, Layer, Shift
from mmpeft.formats.lycoris import multiplied
from mmpeft.formats.words import Rows, placed_rows, table_of
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at, own_parameters
from mmpeft.methods.base import Method
from mmpeft.methods.recipe import identity
from mmpeft.methods.selective.bitfit import BitFit
from mmpeft.methods.selective.full import Full
from mmpeft.methods.selective.textual_inversion import TextualInversion
from mmpeft.parts import Mask
from mmpeft.parts.base import Placement
from mmpeft.sites import sites

WORDS = TextualInversion.__name__.lower()
"""How the keys of parts that hold rows of tables begin."""


@dataclass
class Held:
    """What the masks of a tuning hold, as `Content` has it."""

    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    shifts: list[Shift] = field(default_factory=list)
    words: dict[str, Rows] = field(default_factory=dict)


def held(model: nn.Module, placements: Sequence[Placement], adapted: Collection[str]) -> Held:
    """The tensors that masks train: of whole modules, one by one where a module is adapted too, or rows of tables.

    Raises:
        Refused: what is trained is one of several names of a tensor, which a reader would change under all of them.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    found = Held()
    tables: dict[tuple[str, ...], dict[int, Tensor]] = {}
    shared = names_of_one(model)
    for placement in placements:
        part = placement.part
        assert isinstance(part, Mask)
        names = [f"{hook.path}.{hook.name}".lstrip(".") for hook in placement.hooks]
        if placement.key.startswith(WORDS):
            assert part.rows is not None
            rows = tables.setdefault(tuple(sorted(names)), {})
            rows.update(zip(range(part.rows[0], part.rows[1]), part.value.detach()))
            continue
        for hook in placement.hooks:
            base = base_value(module_at(model, hook.path), hook.name)
            if base is None:
                found.shifts.append(Shift(hook.path, "bias", part.value.detach()))
                continue
            own = tensors.setdefault(hook.path, {})
            start = own.get(hook.name, base.detach().to(part.value.dtype))
            value = put_rows(start, part.value.detach(), part.rows, part.dim)
            own[hook.name] = value if hook == placement.hooks[0] else value.clone()  # files have no shared tensors
    for path, own in tensors.items():
        if path and {name for name, _ in own_parameters(module_at(model, path))} == set(own) and path not in adapted:
            found.whole[path] = own
            continue
        for name, value in own.items():
            full = f"{path}.{name}".lstrip(".")
            others = [other for other in shared[identity(model, full)] if other != full]
            apart = [o for o in others if not _alike(tensors, o, value)]
            if apart:
                raise Refused(f"{full} is trained and {apart[0]}, the same tensor, is not: readers would change both")
            found.base[full] = value
    for changed, rows in tables.items():
        path = table_of(model, changed, shared[identity(model, changed[0])], tables)
        found.words[path] = tuple(sorted(rows)), torch.stack([rows[index] for index in sorted(rows)])
    return found


def differences(model: nn.Module, placements: Sequence[Placement]) -> tuple[list[Layer], list[Shift]]:
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


def _alike(tensors: Mapping[str, Mapping[str, Tensor]], name: str, value: Tensor) -> bool:
    path, _, own = name.rpartition(".")
    other = tensors.get(path, {}).get(own)
    return other is not None and torch.equal(other, value)


def names_of_one(model: nn.Module) -> dict[Hashable, list[str]]:
    """The names of each tensor."""
    found: dict[Hashable, list[str]] = {}
    for site in sites(model):
        if site.role == "param":
            found.setdefault(identity(model, site.path), []).append(site.path)
    return found


# -- into a model -------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """What to attach, the values to set afterwards, and what the model has no place for."""

    methods: list[Method] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    """By the name of the tensor."""
    rows: dict[str, Rows] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)

    def fill(self, placement: Placement) -> None:
        """Set the value of a mask."""
        part, hook = placement.part, placement.hooks[0]
        assert isinstance(part, Mask)
        name = f"{hook.path}.{hook.name}".lstrip(".")
        if part.rows is not None and hook.path in self.rows:
            indices, rows = self.rows[hook.path]
            wanted = range(*part.rows)
            part.value.copy_(rows[[indices.index(index) for index in wanted]])
            return
        part.value.copy_(self.values[name])
        if name in self.frozen:
            part.value.requires_grad_(False)


def fit_tensors(model: nn.Module, content: Content, where: object) -> Fit:
    """Methods that hold the tensors of a file in a model, as PEFT puts them there; the model is not changed.

    A tensor of the base replaces it under all of its names, a module saved whole is a copy under one. What equals the
    model's own is left out, and so is what the model has no tensor for.

    Raises:
        AdapterFileError: a tensor of another shape, or an incomplete module.
    """
    found = Fit()
    tied = names_of_one(model)
    known = {name: key for key, names in tied.items() for name in names}
    for name in known:  # in the model's order, in which later ones win
        if name in content.base:
            value, own = content.base[name], _tensor(model, name)
            _check_shape(model, name, value, own, where)
            for other in tied[known[name]]:
                found.values[other] = value
    found.unused = [name for name in content.base if name not in known]
    found.frozen = {name for name, value in found.values.items() if value.dim() > 1}
    for name in list(found.frozen):
        if _equal(found.values[name], _tensor(model, name)):
            del found.values[name]
    for name, value in _whole(model, content.whole, where).items():
        found.values[name] = value
        found.frozen.discard(name)
    created: list[str] = []
    for shift in content.shifts:
        if (
            content.format in ("peft", "diffusers") and f"{shift.path}.{shift.tensor}" not in known
        ):  # the update has one of its own
            created.append(_new_bias(model, found, shift, where))
        else:
            _add(model, found, shift, known, where)
    _place(model, found, tied, created, where)
    for path in content.words:
        names, kept = placed_rows(model, path, content.words, tied, where)
        if names:
            found.rows |= {name.rpartition(".")[0]: kept for name in names}
            at = "|".join(f"param & path={name}" for name in names)
            found.methods.append(TextualInversion(at=at, rows=tuple(sorted(kept[0]))))
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    value: Tensor = base_value(module_at(model, path), own)
    return value


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.device, b.dtype), b)


def _check_shape(model: nn.Module, name: str, value: Tensor, own: Tensor, where: object) -> None:
    if value.shape != own.shape:
        table = isinstance(module_at(model, name.rpartition(".")[0]), nn.Embedding) or hasattr(
            model, "resize_token_embeddings"
        )
        resize = f" (its words were added to: model.resize_token_embeddings({len(value)}))" if table else ""
        raise AdapterFileError(
            f"{where}: {name} has shape {tuple(value.shape)}, the model's has {tuple(own.shape)}; build the model with "
            f"as many rows{resize}"
        )


def _whole(model: nn.Module, whole: Mapping[str, Mapping[str, Tensor]], where: object) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for path, own in whole.items():
        if path not in modules:
            raise AdapterFileError(
                f"{where}: {type(model).__name__} has no module {path!r}, which the file saves whole"
            )
        names = dict(own_parameters(modules[path]))
        tied: dict[int, list[str]] = {}
        for name, parameter in names.items():
            tied.setdefault(id(parameter), []).append(name)
        missing = [same[0] for same in tied.values() if not set(same) & set(own)]
        for what, keys in (("not a parameter of it", set(own) - set(names)), ("not in the file", missing)):
            if keys:
                raise AdapterFileError(f"{where}: the module {path!r} is saved whole, but {min(keys)!r} is {what}")
        for name, tensor in own.items():
            if tensor.shape != names[name].shape:
                raise AdapterFileError(
                    f"{where}: {path}.{name} has shape {tuple(tensor.shape)}, the model's has "
                    f"{tuple(names[name].shape)}; build the model with as many outputs"
                )
        for same in tied.values():  # of several names of one tensor the last wins
            value = own[[name for name in same if name in own][-1]]
            found |= {f"{path}.{name}": value for name in same}
    return found


def _add(model: nn.Module, found: Fit, shift: Shift, known: Mapping[str, Hashable], where: object) -> None:
    """The new value of a bias, or of a norm's weight."""
    name = f"{shift.path}.{shift.tensor}"
    if name not in known:
        modules = [path for path, _ in model.named_modules()]
        raise AdapterFileError(
            f"{where}: {type(model).__name__.removeprefix('Tuned')} has no {name}, of which the file holds a "
            f"difference. Load the base that the adapter was made for.{nearest(shift.path, modules)}"
        )
    base = _tensor(model, name)
    if base.shape != shift.value.shape:
        raise AdapterFileError(
            f"{where}: the difference of {name} has shape {tuple(shift.value.shape)}, the model's has "
            f"{tuple(base.shape)}; the adapter was made for another base"
        )
    before = found.values[name] if name in found.values else base.detach()
    found.values[name] = before.float() + shift.value.to(before.device, torch.float32)
    found.frozen.discard(name)


def _new_bias(model: nn.Module, found: Fit, shift: Shift, where: object) -> str:
    modules = dict(model.named_modules())
    weight = base_value(modules[shift.path], "weight") if shift.path in modules else None
    if weight is None or len(shift.value) not in weight.shape[:2]:
        raise AdapterFileError(
            f"{where}: {shift.path} has a bias of {len(shift.value)} values inside its update, and no such module"
        )
    found.values[f"{shift.path}.bias"] = shift.value
    return shift.path


def _place(
    model: nn.Module, found: Fit, tied: Mapping[Hashable, Sequence[str]], created: Sequence[str], where: object
) -> None:
    """A `Full` for all tensors; names of one tensor that have different values need one each."""
    rounds: list[list[str]] = []
    for names in tied.values():
        groups: list[list[str]] = []
        for name in names:
            if name in found.values:
                same = (
                    g
                    for g in groups
                    if found.values[g[0]] is found.values[name] or torch.equal(found.values[g[0]], found.values[name])
                )
                group = next(same, None)
                if group is None:
                    groups.append([name])
                else:
                    group.append(name)
        for index, group in enumerate(groups):
            rounds += [[]] * (index + 1 - len(rounds))
            rounds[index] = rounds[index] + group
    for names in rounds:
        found.methods.append(Full(at="|".join(f"param & path={name}" for name in names)))
    if created:
        available = [site for site in sites(model) if site.kind == "linear" and site.path in created]
        lacking = set(created) - {site.path for site in available if site.role.split(".")[0] in BitFit.created_roles}
        if lacking:
            raise AdapterFileError(f"{where}: {min(lacking)} gets a bias by its update, and none can be given to it")
        chosen = dict.fromkeys(f"{site.role} & path={site.path}" for site in available)
        found.methods.append(BitFit(at="|".join(chosen)))
