"""LoRA and (IA)³ in AdapterHub folders: `<module>.loras.<name>.lora_A` [r, i] and `.lora_B` [o, r].

A fused linear of q, k and v has the pairs of those that `attn_matrices` names, one below the other: [n r, i] and
[n o, r]. (IA)³ is `lora_B` [o, 1] alone, a factor of what a linear gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats.content import Content, Layer, Scaling, assemble
from mmpeft.functional.rows import take_rows
from mmpeft.sites import Site, sites
from mmpeft.types import Facts, Json


def read(config: Facts, linear: str, slots: Mapping[str, Mapping[str, Tensor]], folder: Path) -> Content:
    """Updates and vectors by module; `linear` is what the model calls its fused q, k and v, if it has one.

    Raises:
        AdapterFileError: another method, or tensors that do not belong together.
    """
    for option, why in LOW_RANK_OTHERS.items():
        if config.get(option):
            raise AdapterFileError(f"{folder / 'adapter_config.json'}: {option} means {why}; no method here is that")
    r, alpha = config.get("r"), config.get("alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
        raise AdapterFileError(f"{folder / 'adapter_config.json'}: r {r!r} and alpha {alpha!r}; expected numbers")
    scaled = config.get("composition_mode") == "scale"
    if scaled and (r != 1 or alpha != 1):
        raise AdapterFileError(
            f"{folder / 'adapter_config.json'}: (IA)³ with r {r} and alpha {alpha}; expected 1 and 1"
        )
    wanted = {"lora_B"} if scaled else {"lora_A", "lora_B"}
    layers: list[Layer] = []
    vectors: list[Scaling] = []
    for path, own in slots.items():
        if set(own) != wanted or any(tensor.dim() != 2 for tensor in own.values()):
            raise AdapterFileError(f"{folder}: {path} has {sorted(own)}, expected {sorted(wanted)}, matrices all")
        b = own["lora_B"]
        a = b.new_ones(1, 1) if scaled else own["lora_A"]
        fused = linear != "" and linear == path.rpartition(".")[2]
        if scaled:
            vectors.append(Scaling(path, _thirds(b, 1.0, config, path, folder) if fused else b[:, 0], "output"))
        elif fused:
            layers.append(_merged(path, a, b, alpha / r, config, folder))
        else:
            layers.append(replace(assemble({"down": a, "up": b}, path, folder), alpha=float(alpha)))
    return Content("adapterhub", layers, vectors, dropout=float(config.get("dropout") or 0.0))


LOW_RANK_OTHERS = {
    "use_gating": "a gate",
    "vera_d": "VeRA, whose random matrices are not in the file",
    "vera_b": "VeRA, whose random matrices are not in the file",
    "use_dora": "DoRA that scales biases as well and leaves alpha out of its lengths",
}


def _chosen(config: Facts) -> list[int]:
    """Which of q, k and v a fused linear has updates of."""
    return [i for i, name in enumerate("qkv") if name in (config.get("attn_matrices") or ())]


def _thirds(b: Tensor, rest: float, config: Facts, path: str, folder: Path) -> Tensor:
    """A vector on some thirds of the rows as one on all."""
    chosen = _chosen(config)
    if not chosen or len(b) % len(chosen) or b.shape[1] != 1:
        raise _not_merged(b, path, config, folder)
    rows = len(b) // len(chosen)
    found = b.new_full((3, rows), rest)
    found[chosen] = b.view(len(chosen), rows)
    return found.flatten()


def _merged(path: str, a: Tensor, b: Tensor, scale: float, config: Facts, folder: Path) -> Layer:
    """Pairs of some of q, k, v in one linear: `lora_A` [n r, i], `lora_B` [n o, r]; each has its own third of rows."""
    chosen, r = _chosen(config), b.shape[1]
    count = len(chosen)
    if count == 0 or len(a) != count * r or len(b) % count:
        raise _not_merged(b, path, config, folder)
    rows = len(b) // count
    up = b.new_zeros(3 * rows, count * r)
    for n, i in enumerate(chosen):
        up[i * rows : (i + 1) * rows, n * r : (n + 1) * r] = b[n * rows : (n + 1) * rows]
    return Layer(path, a, up, scale * count * r).trimmed()


def _not_merged(b: Tensor, path: str, config: Facts, folder: Path) -> AdapterFileError:
    named = config.get("attn_matrices")
    return AdapterFileError(f"{folder}: {path} has lora_B {list(b.shape)}, which does not fit attn_matrices={named}")


# -- out ---------------------------------------------------------------------------------------------------


def written(content: Content, model: nn.Module, network: tuple[str, str]) -> tuple[Json, dict[str, Tensor]]:
    """Config and tensors; the library's options choose linears by role, the same in every block.

    `network` are the roles of its options `intermediate_lora` and `output_lora`.

    Raises:
        Refused: other linears, vectors on what enters, or DoRA.
    """
    roles = {"attn.q": "q", "attn.k": "k", "attn.v": "v", network[0]: "intermediate", network[1]: "output"}
    linears: dict[str, list[Site]] = {}
    for site in sites(model):
        if site.kind == "linear" and site.role in roles:
            linears.setdefault(site.path, []).append(site)
    layers = [layer.baked() for layer in content.layers]
    if any(layer.magnitude is not None for layer in layers):
        raise Refused("there is DoRA; that of adapters scales biases as well. Use dora='low_rank', or tuning.save()")
    rank = max((_widest(layer, linears.get(layer.path, [])) for layer in layers), default=1)
    chosen: dict[int, set[str]] = {}
    tensors: dict[str, Tensor] = {}
    items: list[Layer | Scaling] = [*layers, *content.scalings]
    for item in items:
        own = linears.get(item.path, [])
        if not own or own[0].depth is None:
            raise Refused(f"adapters has no option for {item.path}; it has q, k, v and the two linears of the network")
        if isinstance(item, Layer):
            taken, halves = _pairs(item, own, rank)
        elif item.side == "input":
            raise Refused(
                f"adapters has (IA)³ on the results of linears, none on what enters {item.path}; "
                "IA3(at='attn.{k,v}|mlp.up', side='output') is like that"
            )
        else:
            taken, halves = _vectors(item, own)
        chosen.setdefault(own[0].depth, set()).update(roles[site.role] for site in taken)
        tensors |= {f"{item.path}.loras.default.{name}": tensor for name, tensor in halves.items()}
    if len({tuple(sorted(names)) for names in chosen.values()}) > 1:
        raise Refused(f"blocks have updates of different linears, {chosen}; adapters has one config for all")
    names = next(iter(chosen.values()))
    depths = {site.depth for own in linears.values() for site in own}
    vectors = bool(content.scalings)
    return {
        "architecture": "lora",
        "selfattn_lora": bool(names & set("qkv")),
        "intermediate_lora": "intermediate" in names,
        "output_lora": "output" in names,
        "attn_matrices": sorted(names & set("qkv"), key="qkv".index),
        "leave_out": sorted(depths - set(chosen)),
        "r": rank,
        "alpha": rank,
        "dropout": content.dropout,
        "composition_mode": "scale" if vectors else "add",
        "init_weights": "ia3" if vectors else "lora",
        "use_gating": False,
    }, tensors


def _parts(layer: Layer, own: Sequence[Site]) -> list[tuple[Site, Tensor, Tensor]]:
    """Down and up of each projection of a fused linear that an update changes; of all where it changes none yet."""
    found = []
    for site in own:
        up = take_rows(layer.up, site.rows)
        keep = (up != 0).any(0)
        if keep.any() or not layer.up.any():
            found.append((site, layer.down[keep] if keep.any() else layer.down, up[:, keep] if keep.any() else up))
    return found


def _widest(layer: Layer, own: Sequence[Site]) -> int:
    return max((len(down) for _, down, _ in _parts(layer, own)), default=layer.rank)


def _pairs(layer: Layer, own: Sequence[Site], rank: int) -> tuple[list[Site], dict[str, Tensor]]:
    """The projections that an update changes, and its halves: those of a fused linear one below the other."""
    if own[0].rows is None:
        whole = layer.padded(rank)
        return list(own), {"lora_A": whole.down, "lora_B": whole.up}
    parts = sorted(_parts(layer, own), key=lambda part: ("attn.q", "attn.k", "attn.v").index(part[0].role))
    padded = [Layer("", down, up, float(len(down))).padded(rank) for _, down, up in parts]
    halves = {"lora_A": torch.cat([x.down for x in padded]), "lora_B": torch.cat([x.up for x in padded])}
    return [site for site, _, _ in parts], halves


def _vectors(item: Scaling, own: Sequence[Site]) -> tuple[list[Site], dict[str, Tensor]]:
    """The projections that a vector changes, and its values for those."""
    order = ("attn.q", "attn.k", "attn.v")
    parts = sorted(own, key=lambda site: order.index(site.role)) if own[0].rows is not None else list(own)
    moved = [site for site in parts if (take_rows(item.gamma, site.rows) != 1).any()] or parts
    return moved, {"lora_B": torch.cat([take_rows(item.gamma, site.rows) for site in moved])[:, None]}
