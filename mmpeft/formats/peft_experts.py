"""PEFT's updates of bare parameters (`target_parameters`): low-rank pairs of every expert in a stack.

`lora_A` [E r, ·] has the pairs expert by expert, `lora_B` [·, r E] has the experts innermost. A module with several
such parameters is wrapped once for each: the first of them lies deepest, under as many `base_layer` as come after it.
A parameter that is one matrix (a router's, a linear's) has the pair of one expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats.patterns import value_for
from mmpeft.functional.rows import put_rows
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at, own_modules
from mmpeft.parts import ExpertsDelta
from mmpeft.parts.base import Placement
from mmpeft.types import Facts

OPTION = "target_parameters"
WRAP = ".base_layer"


@dataclass(frozen=True)
class StackLayer:
    """An update `s up[e] down[e]` of each stored matrix: `down` [E, r, columns], `up` [E, rows, r]; E is 1 of one."""

    path: str
    tensor: str
    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.path}.{self.tensor}"


@dataclass(frozen=True)
class StackTensors:
    """What a file holds of stacks: by module path, the `lora_A` and `lora_B` of each wrap, the deepest first."""

    halves: Mapping[str, list[tuple[Tensor, Tensor]]]
    config: Facts

    def tensors(self) -> dict[str, Tensor]:
        """By the names that PEFT gives them."""
        found: dict[str, Tensor] = {}
        for path, halves in self.halves.items():
            for wraps, pair in zip(range(len(halves) - 1, -1, -1), halves):
                found |= {f"{path}{WRAP * wraps}.lora_{x}.weight": half for x, half in zip("AB", pair)}
        return found


def padded(found: StackTensors, rank: int) -> StackTensors:
    """The same updates with zeros up to a rank for every expert, at the same scale; `ranks` says what they have."""
    ranks: dict[str, int] = found.config["ranks"]
    halves = {}
    for path, own in found.halves.items():
        had = [own_rank for name, own_rank in ranks.items() if name.rpartition(".")[0] == path]
        halves[path] = [_padded(*pair, own_rank, rank) for pair, own_rank in zip(own, had)]
    return StackTensors(halves, {**found.config, "ranks": dict.fromkeys(ranks, rank)})


def _padded(a: Tensor, b: Tensor, had: int, rank: int) -> tuple[Tensor, Tensor]:
    down, up = a.view(-1, had, a.shape[1]), b.view(len(b), had, -1)
    more = rank - had
    down = torch.cat([down, down.new_zeros(len(down), more, down.shape[2])], 1)
    up = torch.cat([up, up.new_zeros(len(up), more, up.shape[2])], 1)
    return down.flatten(0, 1), up.flatten(1)


def is_stack(path: str, config: Facts, targeted: bool) -> bool:
    """Whether a module path of a file is one whose parameters have updates; `targeted` if `target_modules` names it."""
    names = config.get(OPTION) or ()
    bare = path.replace(WRAP, "")
    owners = [name.rpartition(".")[0] for name in names]
    return any(bare == o or bare.endswith(f".{o}") if o else not targeted for o in owners)


def taken(
    slots: dict[str, dict[str, Tensor]], paths: Collection[str], config: Facts, where: object
) -> StackTensors | None:
    """Take the updates of stacks out of the slots of a file."""
    halves: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path in sorted(paths, key=lambda path: -path.count(WRAP)):
        own = slots.pop(path)
        if set(own) != {"down", "up"}:
            raise AdapterFileError(f"{where}: {path} has {sorted(own)}; an update of a parameter has lora_A and lora_B")
        halves.setdefault(path.replace(WRAP, ""), []).append((own["down"], own["up"]))
    return StackTensors(halves, config) if halves else None


def fit(model: nn.Module, found: StackTensors, where: object) -> list[StackLayer]:
    """The updates of a file as those of the model's own tensors.

    Raises:
        AdapterFileError: they are not those of the tensors that the config names, or of another shape.
    """
    layers: list[StackLayer] = []
    named = {path: _named(path, module, found.config[OPTION]) for path, module in own_modules(model)}
    for path in {*found.halves, *(path for path, names in named.items() if names)}:
        halves, names = found.halves.get(path, []), named.get(path, [])
        if len(halves) != len(names):
            raise AdapterFileError(
                f"{where}: {path or 'the model'} has updates of {len(halves)} parameters, and {OPTION} names "
                f"{names or 'none'} there; the file is a part, or its base was another"
            )
        module = module_at(model, path)
        for name, (a, b) in zip(names, halves):
            layers.append(_layer(module, path, name, a, b, found.config, where))
    return layers


def _named(path: str, module: nn.Module, targets: Collection[str]) -> list[str]:
    """Own parameters of a module that PEFT's rule takes: the names given, or what ends with them after a dot."""
    names = [name for name, value in module._parameters.items() if value is not None]
    return [n for n in names if any(f".{path}.{n}".endswith(f".{target}") for target in targets)]


def _layer(module: nn.Module, path: str, name: str, a: Tensor, b: Tensor, config: Facts, where: object) -> StackLayer:
    shape = tuple(base_value(module, name).shape)
    if len(shape) not in (2, 3):
        raise AdapterFileError(f"{where}: {path}.{name} is {list(shape)}, no matrix and no stack of matrices")
    count, swaps = (shape[0], _swaps(module)) if len(shape) == 3 else (1, True)
    inputs, outputs = (shape[-1], shape[-2]) if swaps else (shape[-2], shape[-1])
    if a.shape != (len(a), inputs) or b.shape != (outputs, len(a)) or len(a) % count:
        raise AdapterFileError(
            f"{where}: {path}.{name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; for {list(shape)} it is "
            f"[{count} · r, {inputs}] and [{outputs}, r · {count}]"
        )
    rank = len(a) // count
    known = value_for(config.get("rank_pattern"), f"{path}.{name}", config.get("r"))
    if known != rank:
        raise AdapterFileError(
            f"{where}: rank {known} for {path}.{name}, its tensors have rank {rank}; the files belong to different "
            "adapters"
        )
    alpha = value_for(config.get("alpha_pattern"), f"{path}.{name}", config.get("lora_alpha"))
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    down, up = a.view(count, rank, inputs), b.view(outputs, rank, count).permute(2, 0, 1)
    keep = (down != 0).any(-1).any(0) | (up != 0).any(0).any(0)  # the rest is padding
    keep[0] |= not keep.any()
    down, up = down[:, keep], up[..., keep]
    return StackLayer(path, name, *((down, up) if swaps else (up.mT, down.mT)), scale)


def _swaps(module: nn.Module) -> bool:
    """Whether PEFT takes the second dimension of a module's stacks for what comes out."""
    return not getattr(module, "is_transposed", False)


# -- out ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def tensors_of(model: nn.Module, placements: Sequence[Placement]) -> StackTensors | None:
    """The updates of stacks in a tuning as PEFT keeps them: a rank for each parameter, the scale in the tensors.

    Slices of a fused stack become one update, with the pairs of all, or one where all have the same A.

    Raises:
        Refused: DoRA, which PEFT has not for bare parameters.
    """
    grouped: dict[str, dict[str, list[ExpertsDelta]]] = {}
    for placement in placements:
        if isinstance(placement.part, ExpertsDelta):
            own = grouped.setdefault(placement.home, {})
            own.setdefault(placement.hooks[0].name, []).append(placement.part)
    halves: dict[str, list[tuple[Tensor, Tensor]]] = {}
    ranks: dict[str, int] = {}
    for path, own in grouped.items():
        module = module_at(model, path)
        for name in (name for name in module._parameters if name in own):
            layer = _joined(module, path, name, own[name])
            ranks[layer.name] = layer.down.shape[-2]
            a, b = (layer.down, layer.up) if _swaps(module) else (layer.up.mT, layer.down.mT)
            halves.setdefault(path, []).append((a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)))
    return StackTensors(halves, {OPTION: sorted(ranks), "ranks": ranks}) if halves else None


def _joined(module: nn.Module, path: str, name: str, parts: Sequence[ExpertsDelta]) -> StackLayer:
    weight: Tensor = base_value(module, name)
    if any(part.magnitude is not None for part in parts):
        raise Refused(f"{path}.{name} has DoRA's lengths, which PEFT has not for bare parameters. Use tuning.save()")
    experts, turned = len(weight), parts[0].transposed
    downs, ups = [], []
    for part in parts:
        down, own = (t.detach().expand(experts, *t.shape[-2:]) for t in (part.A, part.B))
        whole = own.new_zeros(experts, weight.shape[-1 if turned else -2], own.shape[-1])
        downs.append(down)
        ups.append(put_rows(whole, own * part.scale, part.rows, -2))
    if all(torch.equal(down, downs[0]) for down in downs):
        down, up = downs[0], torch.stack(ups).sum(0)
    else:
        down, up = torch.cat(downs, -2), torch.cat(ups, -1)
    return StackLayer(path, name, *((up.mT, down.mT) if turned else (down, up)))
