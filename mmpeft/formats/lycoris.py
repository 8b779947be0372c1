"""LyCORIS factors as low-rank layers of the same ΔW.

    LoHa   (U₁D₁) ⊙ (U₂D₂) = (U₁ ∗ U₂)(D₁ ∗ D₂)   row-wise and column-wise Khatri–Rao products, rank r₁r₂
    LoKr   (U₁D₁) ⊗ (U₂D₂) = (U₁ ⊗ U₂)(D₁ ⊗ D₂)   rank r₁r₂; a factor kept whole is `C = I C` or `C I`
    Tucker U · (t ×₂ D), a core of the kernel's size between the two 1 × 1 factors, rank r

A product of more ranks than the weight has rows or columns is multiplied out. The scale is α/r with the rank r of one
factor, 1 without α, and 1 for LoKr with both factors whole, whose file holds no rank. A file with only flat kernels
does not say their height and width: the model does (`shaped`).

Yeh et al. 2023, https://arxiv.org/abs/2309.14859; conventions of github.com/KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError
from mmpeft.formats.content import Content, Layer, read_json, read_tensors
from mmpeft.formats.patterns import value_for
from mmpeft.formats.peft import CONFIG, PREFIX, WEIGHTS, with_rest
from mmpeft.functional.hadamard import khatri_rao
from mmpeft.hosting.host import base_value
from mmpeft.types import Facts, Leaf

Pair = tuple[Tensor, Tensor]
"""`up` [o, r] and `down` [r, i, k...] of one product."""

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
MIDDLE = "lora_mid.weight"
KINDS = dict.fromkeys(LOHA, "LoHa") | dict.fromkeys(LOKR, "LoKr") | {MIDDLE: "Tucker LoRA"}
"""Endings of keys → the factor that they are of."""
TYPES = {"LOHA": "LoHa", "LOKR": "LoKr"}
"""PEFT's names for those that it has too."""


def layer_of(own: Mapping[str, Tensor], path: str, where: Path, scale: float | None = None) -> Layer:
    """The low-rank layer equal to the factors of one module; `alpha`, `magnitude` and Tucker's halves are among them.

    Raises:
        AdapterFileError: a tensor is missing, or the shapes do not belong together.
    """
    wide = {name: tensor.detach().double() for name, tensor in own.items()}
    kinds = {KINDS[name] for name in own if name in KINDS}
    if len(kinds) > 1:
        raise AdapterFileError(f"{where}: {path} has tensors of {' and '.join(sorted(kinds))}; it can be of one factor")
    kind = kinds.pop()
    read = {"LoHa": _hadamard, "LoKr": _kronecker, "Tucker LoRA": _tucker}[kind]
    known = {"alpha", "magnitude", *(name for name, of in KINDS.items() if of == kind)}
    known |= {"down", "up"} if kind == "Tucker LoRA" else set()
    if set(own) - known:
        raise AdapterFileError(f"{where}: {path} is {kind} and also has {sorted(set(own) - known)}")
    (up, down), ranks = read(wide, path, where)
    if scale is None:
        scale = _scale(own.get("alpha"), ranks, path, where)
    up, down = _shortest((up, down))
    magnitude = own.get("magnitude")
    if magnitude is not None and magnitude.numel() != len(up):
        raise AdapterFileError(
            f"{where}: {path} has a DoRA magnitude of shape {tuple(magnitude.shape)}; expected one length for each of "
            f"{len(up)} output rows (lengths of input columns, as LyCORIS can write, are another method)"
        )
    return Layer(
        path,
        down.float().contiguous(),
        up.float().contiguous(),
        scale * len(down),
        None if magnitude is None else magnitude.flatten(),
        factor=kind,
    )


def _scale(alpha: Tensor | None, ranks: set[int], path: str, where: Path) -> float:
    if alpha is not None and alpha.numel() != 1:
        raise AdapterFileError(f"{where}: {path} has an alpha of shape {tuple(alpha.shape)}; expected one number")
    if alpha is None or not ranks:
        return 1.0
    if len(ranks) > 1:
        raise AdapterFileError(
            f"{where}: {path} has factors of the ranks {sorted(ranks)}; which of them divides its alpha is not known"
        )
    return float(alpha) / ranks.pop()


def _hadamard(own: Mapping[str, Tensor], path: str, where: Path) -> tuple[Pair, set[int]]:
    if ("hada_t1" in own) != ("hada_t2" in own):
        raise AdapterFileError(f"{where}: {path} has one of hada_t1 and hada_t2; the file is a part")
    left, right = (_product(own, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", path, where) for n in (1, 2))
    if len(left[0]) != len(right[0]) or left[1].shape[1:] != right[1].shape[1:]:
        _misfit(own, path, where)
    return khatri_rao(*left, *right), {len(left[1]), len(right[1])}


def _kronecker(own: Mapping[str, Tensor], path: str, where: Path) -> tuple[Pair, set[int]]:
    pairs, ranks = [], set()
    for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
        if name in own:
            if own[name].dim() < 2 or {f"{name}_a", f"{name}_b", core} & set(own):
                _misfit(own, path, where)
            pairs.append(_whole(own[name]))
        else:
            pair = _product(own, f"{name}_a", f"{name}_b", core, path, where)
            ranks.add(len(pair[1]))
            pairs.append(_shortest(pair))
    (up, down), (inner_up, inner_down) = pairs
    if down.dim() > 2:
        _misfit(own, path, where)
    return (_outer(up, inner_up), _outer(down, inner_down)), ranks


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """`a ⊗ b` of [m, n] and [p, q, k...] as [m p, n q, k...]; `torch.kron` fails on some strides."""
    return torch.einsum("mn,pq...->mpnq...", a, b).flatten(0, 1).flatten(1, 2)


def _tucker(own: Mapping[str, Tensor], path: str, where: Path) -> tuple[Pair, set[int]]:
    flat = {name: own[name].flatten(1) for name in ("down", "up") if name in own and own[name].dim() >= 2}
    factors = {"up": flat["up"].T} if "up" in flat else {}
    pair = _product({**own, **flat, **factors}, "up", "down", MIDDLE, path, where)
    return pair, {len(own["down"])}


def _product(own: Mapping[str, Tensor], a: str, b: str, core: str, path: str, where: Path) -> Pair:
    """`a b`, or with a core [r, r, k...] between them `aᵀ (core ×₂ b)`."""
    missing = [name for name in (a, b) if name not in own]
    if missing:
        raise AdapterFileError(
            f"{where}: {path} has {' and '.join(sorted(own))} but no {missing[0]}; the file is a part"
        )
    left, right, middle = own[a], own[b], own.get(core)
    if left.dim() != 2 or right.dim() < 2 or not right.numel() or not left.numel():
        _misfit(own, path, where)
    if middle is None:
        if left.shape[1] != len(right):
            _misfit(own, path, where)
        return left, right
    if middle.dim() < 3 or right.dim() != 2 or middle.shape[:2] != (len(left), len(right)):
        _misfit(own, path, where)
    return left.T, torch.einsum("pq...,qi->pi...", middle, right)


def _misfit(own: Mapping[str, Tensor], path: str, where: Path) -> NoReturn:
    shapes = ", ".join(
        f"{name} {list(t.shape)}" for name, t in sorted(own.items()) if name not in ("alpha", "magnitude")
    )
    raise AdapterFileError(f"{where}: the tensors of {path} do not belong together: {shapes}")


def _whole(full: Tensor) -> Pair:
    """A matrix or kernel as the product with the smaller unit matrix."""
    rows, columns = len(full), full[0].numel()
    if rows <= columns:
        return torch.eye(rows, dtype=full.dtype), full
    return full.flatten(1), torch.eye(columns, dtype=full.dtype).view(columns, *full.shape[1:])


def _shortest(pair: Pair) -> Pair:
    """The same product with at most min(o, i) columns."""
    up, down = pair
    if len(down) <= min(len(up), down[0].numel()):
        return pair
    return _whole((up @ down.flatten(1)).view(-1, *down.shape[1:]))


def multiplied(delta: Tensor) -> Pair:
    """`down` and `up` of a full difference [o, i, k...], one of them a unit matrix."""
    up, down = _whole(delta)
    return down, up


def shaped(layer: Layer, model: nn.Module) -> Layer:
    """The layer with its kernel in the shape that the model's module has, where the file has flattened it."""
    modules = dict(model.named_modules())
    if not layer.factor or layer.down.dim() > 2 or layer.path not in modules:
        return layer
    weight = getattr(modules[layer.path], "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 3:
        return layer
    kernel = base_value(modules[layer.path], "weight").shape[1:]
    return replace(layer, down=layer.down.view(-1, *kernel)) if kernel.numel() == layer.down.shape[1] else layer


def read_folder(folder: Path) -> Content:
    """A LoHa or LoKr folder of PEFT, whose scale is the config's α/r for every layer.

    Raises:
        AdapterFileError: incomplete, pickled, or with tensors that are no part of such a factor.
    """
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise AdapterFileError(
            f"no {WEIGHTS} in {folder}; it holds {sorted(p.name for p in folder.iterdir())}, and pickled files are "
            "never read, because unpickling runs code"
        )
    tensors, _ = read_tensors(folder / WEIGHTS)
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        if KINDS.get(name) == TYPES[config["peft_type"]]:
            found.setdefault(path, {})[name] = tensor
        else:
            rest[key.removeprefix(PREFIX)] = tensor
    if not found:
        raise AdapterFileError(f"{folder / WEIGHTS} holds no layer of a {config['peft_type']} adapter")
    layers = [layer_of(own, path, folder, _configured(path, own, config, folder)) for path, own in found.items()]
    layers = [replace(layer, flat=layer.down.dim() == 2) for layer in layers]
    targets = config.get("target_modules")
    partial = any(config.get(name) for name in ("layers_to_transform", "exclude_modules"))
    listed = tuple(targets) if isinstance(targets, list) and not partial else ()
    return with_rest((Content("peft", layers, targets=listed), rest), config, folder)


def _configured(path: str, own: Mapping[str, Tensor], config: Facts, where: Path) -> float:
    numbers: list[Leaf] = []
    for name in ("r", "alpha"):
        if not isinstance(config.get(name), int | float):
            raise AdapterFileError(f"{where / CONFIG}: no {name}, so the scale is not known")
        patterns = config.get({"r": "rank_pattern"}.get(name, "alpha_pattern"))
        numbers.append(value_for(patterns, path, config[name]))
    rank, alpha = numbers
    halves = {len(own[name]) for name in ("hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b") if name in own}
    if halves - {rank}:
        raise AdapterFileError(
            f"{where}: rank {rank} for {path}, its tensors have rank {max(halves - {rank})}; the files belong to "
            "different adapters"
        )
    return float(alpha) / float(rank)
